"""The examples run to their end, on the digits model of the repository, and say what is true."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CARD = str(ROOT / "model_cards" / "digits-elbo")


def example(name, folder="examples"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_out_of_distribution_scores_tell_digits_from_others(capsys):
    example("out_of_distribution").main(["--checkpoint", CARD, "--num_images", "16"])
    lines = capsys.readouterr().out.splitlines()
    table = {line[:22].strip(): [float(v) for v in line[22:].split()] for line in lines[-4:]}
    assert set(table) == {"upside down", "inverted", "pixels shuffled", "one grey"}
    assert all(0 <= value <= 1 for row in table.values() for value in row)
    assert table["pixels shuffled"][0] > 0.95 and table["inverted"][0] > 0.95
    assert sum("bits/dim (upper bound)" in line for line in lines) == 5


@pytest.mark.slow
def test_the_table_of_the_docs_is_that_of_these_weights(capsys):
    """To the last figure but one: the sums of a network differ a little between processors."""
    example("out_of_distribution").main([])
    printed = {
        line[:22].strip(): [float(v) for v in line[22:].split()] for line in capsys.readouterr().out.splitlines()[-4:]
    }
    page = (ROOT / "docs" / "likelihood.md").read_text(encoding="utf-8")
    for name, values in printed.items():
        row = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
        assert [float(v) for v in row.groups()] == pytest.approx(values, abs=0.003), name


def test_bits_per_pixel_add_up_to_the_bound(tmp_path, capsys):
    from vdm_diffusers import VDMPipeline, evaluate_likelihood

    module = example("bits_per_pixel")
    module.main(["--checkpoint", CARD, "--num_images", "3", "--output", str(tmp_path / "map.png")])
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert re.search(r"\d\.\d{3} bits/dim on average", capsys.readouterr().out)
    pipe = VDMPipeline.from_pretrained(CARD)
    images = torch.from_numpy(module.load_digits().images).to(torch.uint8)[:8, None]
    bits = module.bits_per_pixel(pipe, images, num_samples=64).flatten(1).mean(1)
    report = evaluate_likelihood(pipe, images, num_samples=128, progress_bar=False)
    without_prior = report.bits_per_dim - float(report.prior.mean()) / 64 / 0.6931471805599453
    assert float(bits.mean()) == pytest.approx(without_prior, abs=0.15)


@pytest.mark.slow
def test_a_stock_pipeline_gets_its_bits_in_three_lines(capsys):
    """Trained with Diffusers' own loop; below the 4.09 bits of 17 equally likely levels."""
    example("stock_ddpm").main(["--num_images", "40"])
    figure, error = (float(v) for v in re.findall(r"\d\.\d{3}", capsys.readouterr().out.splitlines()[-1]))
    assert 1.5 < figure < 4.0 and 0 < error < 0.2
