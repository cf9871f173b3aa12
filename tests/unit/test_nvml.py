"""The GPU sampler against scripted NVML libraries (tests/unit/data/nvml_*.json); none was recorded on a card."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megasapo import metrics
from megasapo.log import nvml
from megasapo.log.nvml import Card, Sampler, start_sampler
from tests.nvml_script import HANDLE, NVMLError, Player, Recorder, _encoded

DATA = Path(__file__).parent / "data"
SCRIPTS = sorted(DATA.glob("nvml_*.json"))
UUID = "11111111-2222-3333-4444-555555555555"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def sampler(script: str, clock: Clock, rank: int = 3) -> Sampler:
    return Sampler(Card(Player(DATA / script), HANDLE, "GPU 0"), rank, period_s=5.0, clock=clock)


def values(found: Any) -> dict[str, float]:
    return {name.removeprefix("gpu/3/"): x for name, x in metrics.scalars(found).items()}


def test_figures_of_a_step() -> None:
    clock = Clock()
    tried = sampler("nvml_all_fields.json", clock)
    for _ in range(2):
        clock.now += 4
        tried.sample()
    clock.now += 2
    assert values(tried.take()) == pytest.approx(
        {
            "util": 90,  # of 80, 100, 90
            "memory_gb": 90,
            "power_w": 1700 / 3,
            "temperature_c": 66,
            "clock_mhz": 1740,
            "clock_mhz_min": 1500,
            "memory_clock_mhz": 3201,
            "throttled_frac": 2 / 3,  # power in the second reading, heat in the third; idleness is none
            "throttled_power_frac": 1 / 3,
            "throttled_thermal_frac": 1 / 3,
            "ecc_errors": 2,
            "nvlink_tx_gb_s": 1.0,  # 9 765 625 KiB are 10 GB, in 10 s
            "nvlink_rx_gb_s": 2.0,
            "nvlink_errors": 3,
            "gpu/energy_j": 5500,  # the card's own counter, not 400 W to 700 W times seconds
        }
    )
    clock.now += 3  # a step shorter than the period: one reading at its end
    short = values(tried.take())
    assert short["util"] == 10
    assert short["throttled_frac"] == 0
    assert short["nvlink_errors"] == 0
    assert short["gpu/energy_j"] == 240
    clock.now += 1
    assert values(tried.take()).keys() == short.keys()


def test_what_a_card_does_not_report_is_left_out_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tried = sampler("nvml_few_fields.json", clock)
    lines = [r.getMessage() for r in caplog.records]
    assert lines == [
        "GPU 0 does not report ecc_errors (Not Supported): left out",
        "GPU 0 does not report energy_j (Not Supported), nvlink_crc_errors (Not Supported), nvlink_recovery_errors "
        "(Not Supported), nvlink_replay_errors (Not Supported), nvlink_rx_gb (Not Supported), nvlink_tx_gb "
        "(Not Supported): left out",
    ]
    clock.now += 5
    tried.sample()
    clock.now += 1
    first = values(tried.take())
    assert not [name for name in first if "nvlink" in name or "ecc" in name]
    assert first["power_w"] == 70
    assert first["gpu/energy_j"] == pytest.approx(60 * 5 + 80 * 1)  # power over time
    clock.now += 10
    assert values(tried.take())["gpu/energy_j"] == pytest.approx(80 * 10)
    assert len(caplog.records) == 2


def test_a_lost_gpu_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    tried = sampler("nvml_lost.json", clock)
    for _ in range(3):
        clock.now += 5
        tried.sample()
    last = values(tried.take())
    assert last.pop("gpu/energy_j") != last.get("gpu/energy_j", 0)  # not a number: unknown, rather than too little
    assert last == {
        "util": 85,
        "memory_gb": 60,
        "power_w": 450,
        "temperature_c": 55,
        "clock_mhz": 1980,
        "clock_mhz_min": 1980,
        "memory_clock_mhz": 3201,
        "throttled_frac": 0,
        "throttled_power_frac": 0,
        "throttled_thermal_frac": 0,
        "ecc_errors": 0,
    }
    clock.now += 5
    assert list(tried.take()) == ["gpu/energy_j"]
    assert [r.getMessage() for r in caplog.records] == ["GPU 0: GPU is lost; its gpu/ figures end here"]


def test_the_thread_samples_until_it_is_closed() -> None:
    seen: list[int] = []

    class Counting(Card):
        def read(self, names: Any) -> dict[str, float]:
            seen.append(len(names))
            return super().read(names)

    tried = Sampler(Counting(Player(DATA / "nvml_all_fields.json"), HANDLE, "GPU 0"), 0, period_s=0.001)
    tried.start()
    deadline = time.monotonic() + 120
    while len(seen) < 20 and time.monotonic() < deadline:
        time.sleep(0.001)
    tried.close()
    after = len(seen)
    assert after >= 20
    time.sleep(0.02)
    assert len(seen) == after
    tried.close()  # twice does no harm


def ranks(device: str, rank: int = 0, others: tuple[Any, ...] = ()) -> Any:
    """One of 1 + len(others) ranks; `others` is what those after it say, or None for the same as this one."""

    def gather(own: Any) -> list[Any]:
        return [own, *(own if other is None else other for other in others)]

    return SimpleNamespace(rank=rank, device=torch.device(device), gather=gather)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Player:
    """A GPU as far as torch says, and a scripted NVML."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: SimpleNamespace(uuid=UUID))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    player = Player(DATA / "nvml_all_fields.json")
    monkeypatch.setitem(sys.modules, "pynvml", player)  # type: ignore[arg-type]
    return player


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert start_sampler(5.0, ranks("cpu", others=(None,))) is None
    assert capsys.readouterr().out == "no gpu/ figures of this run: it computes on the CPU\n"
    assert start_sampler(5.0, ranks("cpu", rank=1, others=(None,))) is None
    assert start_sampler(0.0, ranks("cuda")) is None
    assert capsys.readouterr().out == ""
    assert not caplog.records


def test_without_nvidia_ml_py_one_warning_says_what_to_install(
    gpu: Player, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert start_sampler(5.0, ranks("cuda", others=(None, None))) is None
    expected = "no gpu/ figures of this run: nvidia-ml-py is not installed: pip install nvidia-ml-py"
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", expected)]


def test_the_drivers_refusal_is_a_warning(
    gpu: Player, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise NVMLError(9)

    monkeypatch.setattr(gpu, "nvmlInit", refuse, raising=False)
    assert start_sampler(5.0, ranks("cuda", others=(("", "GPU-other", True),))) is None
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == f"no gpu/ figures of ranks [0]: NVML does not give access to GPU-{UUID} or MIG-{UUID}: error 9"


@pytest.mark.parametrize(
    ("visible", "index", "asked"),
    [
        ("", 0, [f"GPU-{UUID}"]),
        ("6,7", 1, [f"GPU-{UUID}"]),  # torch counts inside CUDA_VISIBLE_DEVICES, NVML outside: the UUID decides
        ("GPU-9999,GPU-1111", 1, [f"GPU-{UUID}"]),
        ("MIG-aaaa", 0, ["MIG-aaaa"]),
        ("unknown to NVML", 0, [f"GPU-{UUID}", f"MIG-{UUID}"]),
    ],
)
def test_a_rank_finds_its_own_gpu(
    visible: str, index: int, asked: list[str], gpu: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def handle(name: str) -> Any:
        names.append(name)
        if len(names) < len(asked):
            raise NVMLError(6)
        return HANDLE

    monkeypatch.setattr(gpu, "nvmlDeviceGetHandleByUUID", handle, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started = start_sampler(60.0, ranks(f"cuda:{index}"))
    assert started is not None
    started.close()
    assert names == asked


@pytest.mark.parametrize(
    ("others", "reports"),
    [
        ([("", "GPU-another", True)], True),
        ([("", f"GPU-{UUID}", True)], True),  # shares the card with rank 0, which counts its energy
        ([("", "GPU-another", False)], False),  # a sum over some of the cards would be taken for the whole
    ],
)
def test_energy_is_counted_once_a_card_and_only_if_all_are_known(gpu: Player, others: list[Any], reports: bool) -> None:
    started = start_sampler(60.0, ranks("cuda", others=tuple(others)))
    assert started is not None
    assert ("gpu/energy_j" in started.take()) == reports
    started.close()


def test_the_second_rank_of_a_shared_card_leaves_its_energy_to_the_first(gpu: Player) -> None:
    own: list[Any] = []
    second = SimpleNamespace(rank=1, device=torch.device("cuda"), gather=lambda mine: own.append(mine) or [mine, mine])
    started = start_sampler(60.0, second)
    assert started is not None
    assert own == [("", f"GPU-{UUID}", True)]
    assert "gpu/energy_j" not in started.take()
    started.close()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_name_what_nvidia_ml_py_has(path: Path) -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    script = json.loads(path.read_text())
    assert {name: getattr(pynvml, name) for name in script["constants"]} == script["constants"]
    assert all(callable(getattr(pynvml, name)) for name, _, _ in script["calls"])
    for mask, names in (
        (nvml.POWER, "SwPowerCap HwPowerBrakeSlowdown"),
        (nvml.THERMAL, "SwThermalSlowdown HwThermalSlowdown"),
        (nvml.THROTTLED & ~nvml.POWER & ~nvml.THERMAL, "HwSlowdown SyncBoost"),
    ):
        bits = [getattr(pynvml, f"nvmlClocksThrottleReason{name}") for name in names.split()]
        assert mask == sum(bits)


def test_what_is_recorded_is_what_is_played(tmp_path: Path) -> None:
    """The recorder between a sampler and a library gives a script that makes the same figures."""
    recorder = Recorder(Player(DATA / "nvml_all_fields.json"))
    clocks = Clock(), Clock()
    original = Sampler(Card(recorder, HANDLE, "GPU 0"), 3, 5.0, clocks[0])
    figures = []
    for step in range(2):
        clocks[0].now += 5
        figures.append(metrics.scalars(original.take()))
        if not step:
            original.sample()
    recorder.save(tmp_path / "script.json", "a card", "test")
    again = Sampler(Card(Player(tmp_path / "script.json"), HANDLE, "GPU 0"), 3, 5.0, clocks[1])
    for step in range(2):
        clocks[1].now += 5
        assert metrics.scalars(again.take()) == figures[step]
        if not step:
            again.sample()


def test_the_recorder_writes_the_librarys_structures_as_plain_values() -> None:
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    fields = (pynvml.c_nvmlFieldValue_t * 2)()
    fields[1].valueType, fields[1].value.ullVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, 2**40
    encoded = _encoded(fields)[1]
    assert (encoded["valueType"], encoded["nvmlReturn"], encoded["value"]["ullVal"]) == (3, 0, 2**40)
    assert _encoded(pynvml.c_nvmlUtilization_t(gpu=50, memory=10)) == {"gpu": 50, "memory": 10}
