"""What evaluate.py writes besides the figure: one row for each image, plots, and the block for a model card."""

import json

import evaluate
import pyarrow.parquet
import pytest
import torch

from vdm_diffusers import VDMPipeline, VDMScheduler, VDMUNet2DModel


def test_files_agree_with_the_figure(tmp_path, capsys):
    torch.manual_seed(0)
    network = VDMUNet2DModel(8, 1, hidden_channels=8, layers_per_block=1, norm_num_groups=4, fourier_exponents=(2,))
    scheduler = VDMScheduler(beta_schedule="log_snr_linear", log_snr_max=9.0)
    VDMPipeline(network, scheduler, num_levels=17).save_pretrained(tmp_path / "model")
    argv = ["--checkpoint", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--max_images", "20"]
    argv += ["--num_samples", "8", "--num_sample_images", "0", "--baseline", "false", "--steps_curve", "4,8"]
    argv += [
        "--resume_dir",
        str(tmp_path / "partial"),
        "--method",
        "discrete",
        "--num_steps",
        "30",
        "--grid",
        "log_snr",
    ]
    assert evaluate.main(argv) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "per_image.parquet").to_pydict()
    assert rows["index"] == list(range(20))
    assert sum(rows["bits_per_dim"]) / 20 == pytest.approx(result["bits_per_dim"], rel=1e-12)
    for i in range(20):
        terms = sum(rows[name][i] for name in ("prior", "diffusion", "reconstruction"))
        assert terms == pytest.approx(rows["bits_per_dim"][i], rel=1e-9)
    assert [row["num_steps"] for row in result["steps_curve"]] == [4, 8]
    assert result["steps_curve"][0]["bits_per_dim"] > result["steps_curve"][1]["bits_per_dim"] > 0
    block = (tmp_path / "out" / "model_card_block.md").read_text()
    made = result["provenance"]
    for value in (f"{result['bits_per_dim']:.4f}", "discrete, 160 network evaluations", "| num steps | 30 |"):
        assert value in block
    for value in (made["command"], made["machine"], made["date"], f"torch {torch.__version__}", result["fingerprint"]):
        assert value in block
    for name in ("terms", "steps", "loss_weights", "most_and_least_likely"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 500
    assert len(list((tmp_path / "partial").rglob("*.safetensors"))) > 0
    before = capsys.readouterr().out.splitlines()[-1]
    assert evaluate.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == before

    argv[argv.index("log_snr")] = "optimal"
    assert evaluate.main(argv) == 2
    assert "estimate_optimal_variance" in capsys.readouterr().err
