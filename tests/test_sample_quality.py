"""FID and KID: what is missing is said; against closed forms where torchmetrics is installed."""

import sys

import evaluate
import pytest
import torch
from sample_quality import WEIGHTS_FILE, SampleQualityError, inception, sample_quality
from torch import nn


class MeanColour(nn.Module):
    """The features of an image: mean level of each channel, and a copy with a spread of its own."""

    num_features = 2

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        flat = pixels.double().flatten(2) / 255
        return torch.stack([flat[:, 0].mean(1), flat[:, 1, 0]], dim=1)


def test_missing_weights_are_told_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SampleQualityError, match=rf"checkpoints/{WEIGHTS_FILE} does not exist.*--fid_weights"):
        inception()
    assert evaluate.main(["--fid", "--fid_weights=/no/such/file.pth", "--checkpoint=/no/such/model"]) == 2
    assert "/no/such/file.pth does not exist" in capsys.readouterr().err


def test_a_missing_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(SampleQualityError, match=r"pip install 'vdm-diffusers\[fid\]'"):
        inception(str(tmp_path / "weights.pth"))
    with pytest.raises(SampleQualityError, match="pip install"):
        sample_quality(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 17, feature=MeanColour())


def test_distances_against_closed_forms():
    pytest.importorskip("torchmetrics")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 9, (300, 1, 4, 4), generator=generator)
    samples = torch.randint(4, 17, (400, 1, 4, 4), generator=generator)
    result = sample_quality(images, samples, 17, feature=MeanColour(), batch_size=64)
    assert result.num_images == 300

    def features(levels):
        return MeanColour()((levels.double() * 255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1))

    a, b = features(images), features(samples[:300])
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    fid = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root
    assert result.fid == pytest.approx(float(fid), rel=1e-4)

    def kernel(x, y):
        return (x @ y.T / 2 + 1) ** 3

    n = len(a)
    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1)) for x in (a, b))
    assert result.kid == pytest.approx(float(within - 2 * kernel(a, b).mean()), rel=1e-3)
    assert result.kid_deviation == pytest.approx(0, abs=1e-6)  # 300 images: one subset, again and again

    same = sample_quality(images, images, 17, feature=MeanColour())
    assert same.fid == pytest.approx(0, abs=1e-6)
    with pytest.raises(SampleQualityError, match="one or three channels"):
        sample_quality(torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4), 17, feature=MeanColour())
    with pytest.raises(SampleQualityError, match="at least 2"):
        sample_quality(images[:1], samples, 17, feature=MeanColour())
