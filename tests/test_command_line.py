"""`vdm-diffusers` on the command line: its five commands, what they read, refuse and leave behind."""

import json
import shutil
import subprocess
import sys

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from vdm_diffusers import evaluate_likelihood
from vdm_diffusers.command_line import main, scoring
from vdm_diffusers.command_line.sources import InputError, NamedImages, read_images
from vdm_diffusers.loading import load_model

ELBO, SIMPLE, CLASS = (f"model_cards/digits-{name}" for name in ("elbo", "simple", "class"))


def run(capsys, *argv):
    code = main([*map(str, argv), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys, *argv):
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    return json.loads(out)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.from_numpy(data.images).to(torch.uint8)[1500:, None], torch.from_numpy(data.target)[1500:].long()


# --- the commands ----------------------------------------------------------------------------------------------------


def test_evaluate_says_what_the_function_says(capsys, digits):
    result = as_json(capsys, "evaluate", ELBO, "digits", "--max_images", 30, "--seed", 3)
    report = evaluate_likelihood(load_model(ELBO), digits[0][:30], generator=3, progress_bar=False)
    assert result["bits_per_dim"] == pytest.approx(report.bits_per_dim, abs=1e-6)
    code, out, _ = run(capsys, "evaluate", ELBO, "digits", "--max_images", 30, "--quiet")
    assert code == 0 and "bits/dim (upper bound)" in out


def test_evaluate_gives_a_class_conditional_model_its_labels(capsys):
    own = as_json(capsys, "evaluate", CLASS, "digits", "--max_images", 40)
    wrong = as_json(capsys, "evaluate", CLASS, "digits", "--max_images", 40, "--class_label", 1)
    assert own["bits_per_dim"] < wrong["bits_per_dim"] - 0.05


def test_compare_prints_the_difference_and_its_bands(capsys):
    code, out, _ = run(capsys, "compare", ELBO, SIMPLE, "digits", "--max_images", 40, "--quiet")
    assert code == 0 and out.startswith("-") and "a is better" in out and "log SNR" in out
    result = as_json(capsys, "compare", ELBO, SIMPLE, "digits", "--max_images", 40)
    assert result["difference"] < 0 and result["is_paired"] and len(result["bands"]) > 4


def test_classify_prints_each_image_and_the_accuracy(capsys):
    result = as_json(capsys, "classify", CLASS, "digits", "--max_images", 40)
    assert result["accuracy"] > 0.85 and len(result["predictions"]) == 40
    code, out, _ = run(capsys, "classify", CLASS, "digits", "--max_images", 5, "--class_labels", 0, 1, "--quiet")
    assert code == 0 and len(out.splitlines()) == 6


def test_sample_draws_a_picture(capsys, tmp_path):
    code, out, _ = run(
        capsys, "sample", CLASS, tmp_path / "grid.png", "--num_images", 4, "--num_inference_steps", 5, "--quiet"
    )
    assert code == 0 and "4 samples" in out and PIL.Image.open(tmp_path / "grid.png").size[0] > 16
    code, _, err = run(capsys, "sample", ELBO, tmp_path / "b.png", "--class_labels", 1)
    assert code == 2 and "not class-conditional" in err


def test_the_module_runs_and_helps():
    for argv in (["--help"], ["score", "--help"]):
        done = subprocess.run([sys.executable, "-m", "vdm_diffusers", *argv], capture_output=True, text=True)
        assert done.returncode == 0 and "usage: vdm-diffusers" in done.stdout
    assert subprocess.run([sys.executable, "-m", "vdm_diffusers"], capture_output=True).returncode == 2


# --- the table -------------------------------------------------------------------------------------------------------


def test_score_finds_planted_faults(tmp_path, digits):
    """5% wrong labels by the odds of the stated label, 5% inverted images by their bits."""
    levels, labels = (part.clone() for part in digits)
    levels, labels = levels[:160], labels[:160]
    chosen = torch.randperm(160, generator=torch.Generator().manual_seed(0))[:16]
    wrong, inverted = chosen[:8], chosen[8:]
    labels[wrong] = (labels[wrong] + 3) % 10
    levels[inverted] = 16 - levels[inverted]
    images = NamedImages(levels, [str(n) for n in range(160)], labels)
    path = scoring.score(load_model(CLASS), images, tmp_path / "t.parquet", class_samples=16, progress_bar=False)
    table = pyarrow.parquet.read_table(path).to_pydict()
    is_wrong, is_inverted = (np.isin(np.arange(160), part.numpy()) for part in (wrong, inverted))
    plain = ~is_inverted
    odds = -np.array(table["label_log_odds"])
    assert average_precision_score(is_wrong[plain], odds[plain]) >= 0.95
    assert average_precision_score(is_inverted, np.array(table["bits_per_dim"])) == 1.0
    octaves = sum(np.array(table[name]) for name in table if name.startswith("octave_"))
    assert np.mean(octaves) == pytest.approx(np.mean(table["diffusion"]), rel=0.1)
    assert np.mean(table["error"]) > 0 and min(table["complexity"]) > 0


def score_args(table, *more):
    return (
        "score",
        ELBO,
        "digits",
        table,
        "--max_images",
        40,
        "--rows_a_part",
        8,
        "--num_samples",
        4,
        "--quiet",
        *more,
    )


def test_a_killed_run_goes_on_and_the_table_is_the_same(capsys, tmp_path, monkeypatch):
    assert run(capsys, *score_args(tmp_path / "whole.parquet"))[0] == 0
    rows, done = scoring._rows, []

    def dies(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return rows(*args)

    monkeypatch.setattr(scoring, "_rows", dies)
    code, _, err = run(capsys, *score_args(tmp_path / "b.parquet"))
    assert code == 130 and "interrupted" in err and not (tmp_path / "b.parquet").exists()
    counted = []
    monkeypatch.setattr(scoring, "_rows", lambda *args: counted.append(1) or rows(*args))
    assert run(capsys, *score_args(tmp_path / "b.parquet"))[0] == 0 and len(counted) == 2
    one, other = (pyarrow.parquet.read_table(tmp_path / f"{n}.parquet") for n in ("whole", "b"))
    assert one.equals(other) and one.num_rows == 40


def test_shares_of_several_machines_make_one_table(capsys, tmp_path):
    assert run(capsys, *score_args(tmp_path / "whole.parquet"))[0] == 0
    code, out, _ = run(capsys, *score_args(tmp_path / "s.parquet", "--share", "0/2"))
    assert code == 0 and "follows when all are" in out
    assert "40 rows" in run(capsys, *score_args(tmp_path / "s.parquet", "--share", "1/2"))[1]
    one, other = (pyarrow.parquet.read_table(tmp_path / f"{n}.parquet") for n in ("whole", "s"))
    assert one.equals(other)
    assert "--share must be i/n" in run(capsys, *score_args(tmp_path / "t.parquet", "--share", "2/2"))[2]


def test_parts_of_other_images_and_tables_of_others_are_left_alone(capsys, tmp_path):
    assert run(capsys, *score_args(tmp_path / "a.parquet"))[0] == 0
    code, _, err = run(capsys, *score_args(tmp_path / "a.parquet", "--seed", 5))
    assert code == 2 and "another model, other images or other arguments" in err
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    code, _, err = run(capsys, *score_args(tmp_path / "mine.parquet"))
    assert code == 2 and "exists" in err and (tmp_path / "mine.parquet").read_bytes() == b"mine"


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_classes(tmp_path):
    for name in ("cats/1.png", "dogs/2.png", "dogs/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (6, 4), (10, 20, 30)).save(tmp_path / name)
    images = read_images(str(tmp_path), 256, 3)
    assert images.names == ["cats/1.png", "dogs/2.png", "dogs/3.png"] and images.labels.tolist() == [0, 1, 1]
    assert images.levels.shape == (3, 3, 4, 6) and images.levels[0, :, 0, 0].tolist() == [10, 20, 30]
    assert read_images(str(tmp_path), 256, 1).levels.shape == (3, 1, 4, 6)
    PIL.Image.new("RGB", (5, 5)).save(tmp_path / "dogs/4.png")
    with pytest.raises(InputError, match="another size"):
        read_images(str(tmp_path), 256, 3)
    (tmp_path / "dogs/4.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_images(str(tmp_path), 256, 3)


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4, 3), dtype=np.uint8))
    assert read_images(str(tmp_path / "a.npy"), 256, 3).levels.shape == (3, 3, 4, 4)
    np.savez(tmp_path / "b.npz", images=np.zeros((3, 1, 4, 4), dtype=np.uint8), labels=np.array([0, 1, 2]))
    assert read_images(str(tmp_path / "b.npz"), 256, 1, max_images=2).labels.tolist() == [0, 1]
    np.savez(tmp_path / "c.npz", other=np.zeros(3))
    with pytest.raises(InputError, match="no array 'images', only other"):
        read_images(str(tmp_path / "c.npz"), 256, 1)
    np.save(tmp_path / "d.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as an array"):  # nothing is unpickled
        read_images(str(tmp_path / "d.npy"), 256, 1)


def test_a_data_set(tmp_path):
    pictures = [PIL.Image.new("L", (4, 4), n) for n in range(5)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"picture": pictures, "kind": [0, 1, 0, 1, 1]}, features=features)
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    images = read_images(str(tmp_path / "data"), 256, 1, max_images=3)
    assert images.labels.tolist() == [0, 1, 0] and images.levels[:, 0, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="no column 'label'"):
        read_images(str(tmp_path / "data"), 256, 1, label_column="label")
    with pytest.raises(InputError, match="cannot be read"):
        read_images(str(tmp_path / "data"), 256, 1, split="validation")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["evaluate", "outputs/nothing-here", "digits"], "error:"),
        (["evaluate", ELBO, "nowhere-at-all"], "cannot be read"),
        (["evaluate", ELBO, "digits", "--max_images", "2", "--num_samples", "1"], "`num_samples` must be at least 2"),
        (["classify", ELBO, "digits"], "no classes to choose among"),
        (["classify", CLASS, "digits", "--class_labels", "0", "77"], "must lie in"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, argv, complaint):
    code, _, err = run(capsys, *argv)
    assert code == 2 and complaint in err and "Traceback" not in err


def test_a_damaged_checkpoint_is_refused(capsys, tmp_path):
    shutil.copytree(ELBO, tmp_path / "card")
    (tmp_path / "card" / "manifest.json").write_text('{"files": {"unet/missing": {"size": 1, "blake2b": ""}}}')
    code, _, err = run(capsys, "evaluate", tmp_path / "card", "digits")
    assert code == 2 and "damaged" in err
