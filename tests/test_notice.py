"""Spot notices of AWS and Google Cloud, as their services give them."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from metadata import Metadata

from raygpt.train import notice

VARIABLES = ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "GCE_METADATA_HOST")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine is no cloud's."""
    monkeypatch.setattr(notice, "_VENDOR", tmp_path / "vendor")
    for name in (*VARIABLES, "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def service() -> Iterator[Metadata]:
    with Metadata() as started:
        yield started


def test_there_is_none_until_there_is_one(service: Metadata) -> None:
    for look in (notice.aws_notice, notice.google_notice):
        service.end = None
        assert look(f"http://{service.host}") is None
        service.end = float(int(time.time()) + 120)
    assert notice.aws_notice(f"http://{service.host}") == service.end
    google = notice.google_notice(f"http://{service.host}")
    assert google is not None and google - time.time() == pytest.approx(30, abs=5)


@pytest.mark.parametrize(
    ("vendor", "cloud"), [("Amazon EC2\n", True), ("Google\n", True), ("QEMU\n", False)]
)
def test_the_cloud_is_known_by_its_machines(vendor: str, cloud: bool) -> None:
    notice._VENDOR.write_text(vendor)
    assert (notice.this_cloud() is not None) == cloud


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    notice._VENDOR.write_text("Amazon EC2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert notice.this_cloud() is None


def test_a_machine_of_no_cloud_is_not_watched() -> None:
    assert notice.this_cloud() is None


@pytest.mark.parametrize("variable", VARIABLES)
def test_ray_is_told_when_the_machine_ends(
    service: Metadata, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if neither the service nor Ray answers at first."""
    drained: list[float] = []
    said: list[str] = []
    deaf = iter([ray.exceptions.RaySystemError("away")])

    def drain(end: float) -> None:
        for error in deaf:
            raise error
        drained.append(end)

    monkeypatch.setattr(notice, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(notice, "drain", drain)
    address = f"http://{service.host}" if variable.startswith("AWS") else service.host
    monkeypatch.setenv(variable, address)
    look = notice.this_cloud()
    assert look is not None
    silent = iter([OSError("no answer"), ValueError("nonsense"), TypeError("no object")])

    def at_first_silent() -> float | None:
        for error in silent:
            raise error
        return look()

    monkeypatch.setattr(notice, "this_cloud", lambda: at_first_silent)
    notice.watch(said.append)
    assert service.asked.wait(30)
    assert not drained
    service.end = float(int(time.time()) + 30)
    deadline = time.monotonic() + 30
    while not drained and time.monotonic() < deadline:
        time.sleep(0.01)
    assert drained == [pytest.approx(service.end, abs=5)]
    assert len(said) == 1 and "the cloud takes" in said[0]
