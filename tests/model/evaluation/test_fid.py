"""The distance against its formula, and drawings of captions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import nn

from omnimamba_model import GREEDY, Sampling
from omnimamba_model.evaluation import draw_captions, fid
from omnimamba_model.evaluation.drawings import read_captions
from omnimamba_model.evaluation.fid import _batches, pictures, read_features

pytest.importorskip("torchmetrics")


class Means(nn.Module):
    """Each channel's mean: three features."""

    def forward(self, images):
        return images.double().mean((2, 3))


def folder(path, seed, shift=0):
    random = np.random.default_rng(seed)
    path.mkdir()
    for i in range(6):
        grey = random.integers(0, 200, (12, 9 + i, 3)) + shift
        Image.fromarray(grey.astype(np.uint8)).save(path / f"{i}.png")
    return path


def test_fid_is_the_distance_of_two_gaussians(tmp_path):
    a, b = folder(tmp_path / "a", 0), folder(tmp_path / "b", 1, shift=30)
    assert fid(a, a, Means()) == pytest.approx(0, abs=1e-6)

    def features(path):
        return Means()(next(_batches(pictures(path), 6))).numpy()

    x, y = features(a), features(b)
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * linalg.sqrtm(cov_x @ cov_y).real)
    assert fid(a, b, Means(), batch=4) == pytest.approx(expected, rel=1e-6)


def test_fid_resizes_bicubically(tmp_path):
    path = folder(tmp_path / "a", 0) / "3.png"  # as wide as it is high
    with Image.open(path) as image:
        expected = np.array(image.resize((299, 299), Image.Resampling.BICUBIC))
    (found,) = next(_batches([path], 1))
    assert np.array_equal(found.permute(1, 2, 0), expected)


def test_fid_looks_at_the_middle_of_a_picture(tmp_path):
    for name, side in (("a", 10), ("b", 30)):
        (tmp_path / name).mkdir()
        for i in range(3):
            wide = Image.new("RGB", (side, 10), "black")
            wide.paste(Image.new("RGB", (10, 10), (40 * i, 90, 10)), ((side - 10) // 2, 0))
            wide.save(tmp_path / name / f"{i}.png")
    assert fid(tmp_path / "a", tmp_path / "b", Means()) == pytest.approx(0, abs=1e-6)


def test_fid_needs_pictures(tmp_path):
    a = folder(tmp_path / "a", 0)
    (tmp_path / "empty").mkdir()
    for other in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match="must be a folder of two pictures or more, got 0"):
            fid(a, other, Means())


def test_captions_are_drawn_once(tmp_path):
    said = []

    class Draws:
        weights = "a"

        def describe(self):
            return {"weights": self.weights}

        def draw(self, prompts, sampling, guidance):
            said.append((list(prompts), sampling.seed, guidance))
            return [Image.new("L", (4, 4), sampling.seed % 251 + i) for i, _ in enumerate(prompts)]

    captions, out = [f"c{i}" for i in range(5)], tmp_path / "out"
    draw_captions(Draws(), captions, out, Sampling(seed=1), 2.0, batch=2)
    assert [(prompts, guidance) for prompts, _, guidance in said] == [
        (["c0", "c1"], 2.0), (["c2", "c3"], 2.0), (["c4"], 2.0),
    ]  # fmt: skip
    assert len({seed for _, seed, _ in said}) == 3  # batches are not drawn with the same dice
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(before) == [*(f"00000{i}.png" for i in range(5)), "drawings.json"]
    (out / "000003.png").unlink()
    draw_captions(Draws(), captions, out, Sampling(seed=1), 2.0, batch=2)
    assert len(said) == 4 and said[3] == said[1]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for other in ((captions, Sampling(seed=2), 2.0), (captions, Sampling(seed=1), 3.0), (["c"], Sampling(seed=1), 2.0)):
        with pytest.raises(ValueError, match="holds drawings of other (sampling|guidance|captions); name another"):
            draw_captions(Draws(), other[0], out, *other[1:], batch=2)
    taught = Draws()
    taught.weights = "b"
    with pytest.raises(ValueError, match="holds drawings of other weights; name another"):
        draw_captions(taught, captions, out, Sampling(seed=1), 2.0, batch=2)
    assert len(said) == 4
    draw_captions(Draws(), [], tmp_path / "nothing", GREEDY, 1.0)
    for seed in (2**63 - 1, -(2**63)):  # as the command takes them
        draw_captions(Draws(), captions, tmp_path / f"{seed}", Sampling(seed=seed), 2.0, batch=2)
    assert len({seed for _, seed, _ in said[4:]}) == 6


def test_files_that_are_no_captions_and_no_features(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text"):
        read_captions(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="a.txt is no file of torch.export.save"):
        read_features(tmp_path / "a.txt")


def test_a_file_without_captions(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n")
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}))
    for name in ("a.txt", "a.json"):
        with pytest.raises(ValueError, match=f"{name} has no captions"):
            read_captions(tmp_path / name)


def test_captions_of_both_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n a dog \n")
    assert read_captions(tmp_path / "a.txt") == ["a cat", "a dog"]
    notes = [{"image_id": 2, "caption": "two "}, {"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "x"}]
    files = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": files, "annotations": notes}))
    assert read_captions(tmp_path / "a.json") == ["one", "two"]


def test_an_exported_extractor_does_for_the_command(tmp_path, capsys):
    from omnimamba_model import cli

    a, b = folder(tmp_path / "a", 0), folder(tmp_path / "b", 1, shift=30)
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.zeros(2, 3, 299, 299, dtype=torch.uint8)
    exported = torch.export.export(Means(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "means.pt2")
    assert cli.main(["evaluate", "fid", str(a), str(b), "--features", str(tmp_path / "means.pt2")]) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(fid(a, b, Means()), abs=1e-3)


class Inception(nn.Module):
    """What torchmetrics builds around torch-fidelity's network, small: 2048 features of a picture's coarse colours."""

    def __init__(self, name, features_list, feature_extractor_weights_path, antialias):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.map = nn.Linear(12, 2048, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 299, 299)
        return self.map(nn.functional.adaptive_avg_pool2d(images.to(self.map.weight.dtype), 2).flatten(1))


def test_inceptions_weights_are_read_from_a_file(tmp_path, capsys, monkeypatch):
    """Through torchmetrics' own argument, by the command; the distance is that between the means and covariances of
    those 2048 features, whose eigenvalues are not worked out here."""
    from omnimamba_model import cli

    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", Inception)
    given, told = [], torch.tensor(12.5, dtype=torch.float64)
    monkeypatch.setattr("torchmetrics.image.fid._compute_fid", lambda *moments: given.extend(moments) or told)
    a, b = folder(tmp_path / "a", 0), folder(tmp_path / "b", 1, shift=30)
    command = ["evaluate", "fid", str(a), str(b), "--inception", str(tmp_path / "inception.pth")]
    assert cli.main(command) == 2 and "must be a file with Inception's weights" in capsys.readouterr().err
    weight = torch.randn(2048, 12, generator=torch.Generator().manual_seed(0)) / 50
    torch.save({"map.weight": weight}, tmp_path / "inception.pth")
    assert cli.main(command) == 0
    found = float(capsys.readouterr().out.split()[1])

    def features(path):
        coarse = nn.functional.adaptive_avg_pool2d(next(_batches(pictures(path), 6)).double(), 2).flatten(1)
        return (coarse @ weight.double().T).numpy()

    assert found == 12.5 and len(given) == 4
    for mean, covariance, path in ((*given[:2], a), (*given[2:], b)):
        expected = features(path)
        np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-9)
        np.testing.assert_allclose(covariance, np.cov(expected.T), rtol=1e-6, atol=1e-6 * expected.var())
