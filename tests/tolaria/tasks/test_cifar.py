"""The loader reads the standard binary files, byte for byte."""

from pathlib import Path

import numpy as np
import pytest
import torch

from esper.tolaria import tasks
from esper.tolaria.trainer import train_epoch

FILES = {
    "cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"],
    "cifar100": ["train.bin", "test.bin"],
}
LABELS = {"cifar10": 1, "cifar100": 2}
CLASSES = {"cifar10": 10, "cifar100": 100}


def _write(folder: Path, name: str, per_file: int = 20) -> dict[str, np.ndarray]:
    """Files in which the first pixel of each plane of an image tells its label."""
    generator = np.random.default_rng(0)
    written = {}
    for file in FILES[name]:
        records = generator.integers(0, 256, (per_file, LABELS[name] + 3072), dtype=np.uint8)
        labels = generator.integers(0, CLASSES[name], per_file)
        records[:, 0] = 3  # the coarse label of CIFAR-100
        records[:, LABELS[name] - 1] = labels
        for plane in range(3):
            records[:, LABELS[name] + plane * 1024] = labels + 10 * plane
        records.tofile(folder / file)
        written[file] = records
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_images_and_fine_labels_are_those_of_the_files(tmp_path: Path, name: str) -> None:
    written = _write(tmp_path, name)
    task = tasks.get(name, tmp_path)
    num_train = 20 * (len(FILES[name]) - 1)
    sizes = [len(part) for part in (task.train, task.validation, task.test)]
    assert sizes == [num_train - num_train // 10, num_train // 10, 20]
    records = written[FILES[name][-1]]
    assert task.test.targets.tolist() == records[:, LABELS[name] - 1].tolist()
    # Each plane is shifted and scaled by the statistics of the training images, the same for all.
    planes = records[:, LABELS[name] :].reshape(20, 3, 32, 32).astype(np.float32)
    for plane in range(3):
        scaled = task.test.inputs[:, plane].flatten().double().numpy()
        fit = np.polyfit(planes[:, plane].ravel(), scaled, 1)
        assert np.allclose(np.polyval(fit, planes[:, plane].ravel()), scaled, atol=1e-4)
        assert fit[0] > 0
    assert task.train.inputs.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (task.train.inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-4


def test_the_host_trains_on_it(tmp_path: Path) -> None:
    _write(tmp_path, "cifar10", per_file=8)
    task = tasks.get("cifar10", tmp_path)
    model = task.host(0, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = [train_epoch(model, optimizer, task.train_batches(0, 0), task.loss) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_a_cut_file_is_refused_by_name_and_size(tmp_path: Path) -> None:
    _write(tmp_path, "cifar100")
    with (tmp_path / "train.bin").open("r+b") as file:
        file.truncate(20 * 3074 - 1)
    with pytest.raises(ValueError, match=r"train.bin has 61479 bytes, .* records of 3074"):
        tasks.get("cifar100", tmp_path)


def test_a_label_out_of_range_is_refused(tmp_path: Path) -> None:
    records = _write(tmp_path, "cifar10")["test_batch.bin"]
    records[3, 0] = 10
    records.tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="has the label 10, but it must be below 10"):
        tasks.get("cifar10", tmp_path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="data_batch_1.bin"):
        tasks.get("cifar10", tmp_path)
