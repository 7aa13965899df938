# SPDX-License-Identifier: Apache-2.0
"""Equality comes before times; what cannot take part is named."""

import importlib
import json
import time
import types

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Case, Contender, Missing, Setup, compare, optional, within
from benchmarks.limits import Limits
from benchmarks.memory import training_bytes
from benchmarks.report import records_table
from benchmarks.timing import Time

CPU = torch.device("cpu")
ONE = (torch.ones(3),)


def case(**options):
    return Case("a case", lambda: None, **options)


def setup(**contenders):
    return Setup(expected=lambda: ONE, contenders=contenders)


def compute(seconds):
    """Keep the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return ONE


def wrong():
    return (torch.full((3,), 1.01),)


def broken():
    raise RuntimeError("no kernel\nfor this shape")


@pytest.mark.parametrize("timed", [True, False])
def test_different_outputs_are_named_before_anything_is_timed(monkeypatch, timed):
    monkeypatch.setattr(harness, "time_all", pytest.fail)
    with pytest.raises(AssertionError, match=r"^a case, peer: .*not close"):
        compare(case(), setup(ours=Contender(lambda: ONE), peer=Contender(wrong)), CPU, timed=timed)
    with pytest.raises(AssertionError, match=r"^a case, ours: "):
        compare(case(), setup(ours=Contender(wrong)), CPU, timed=timed)


def test_random_contender_is_compared_by_what_it_names():
    ours = Contender(run=wrong, checked=lambda: ONE)
    assert compare(case(), setup(ours=ours), CPU, timed=False)["equal"] == "ours"


def test_tolerance_is_that_of_the_case():
    compare(case(check=within(atol=0.02)), setup(ours=Contender(wrong)), CPU, timed=False)
    compare(case(check=harness.within_norm(0.02)), setup(ours=Contender(wrong)), CPU, timed=False)
    with pytest.raises(AssertionError, match=r"output 0: relative error 1\.0e-02 > 5\.0e-03"):
        compare(
            case(check=harness.within_norm(5e-3)), setup(ours=Contender(wrong)), CPU, timed=False
        )


def test_record_holds_ratio_rates_and_missing_peers(monkeypatch):
    monkeypatch.setattr(harness, "measured_limits", lambda *_: Limits(1e-3, 1e-6))
    contenders = {
        "ours": Contender(lambda: compute(1e-3)),
        "twice": Contender(lambda: compute(2e-3)),
        "absent": optional("no_such_module"),
        "broken": Contender(broken),
        "slow": Contender(lambda: ONE, slow_start=True),
    }
    quick = compare(case(bytes=1000, flops=1000), setup(**contenders), CPU, quick=True)
    assert json.loads(json.dumps(quick)) == quick
    assert quick["subject"] == "ours"
    assert 1000 < quick["us"] < 2000
    assert quick["gb_s"] == pytest.approx(1 / quick["us"], rel=1e-3)
    assert quick["copy_share"] == pytest.approx(1e3 / quick["us"], rel=1e-2)
    assert quick["tflop_s"] == pytest.approx(1e-3 / quick["us"], rel=1e-3)
    assert quick["matmul_share"] == pytest.approx(1e3 / quick["us"], rel=1e-2)
    assert list(quick["peers"]) == ["twice", "absent", "broken", "slow"]
    assert 1.3 < quick["peers"]["twice"]["ratio"] < 2.2
    absent = "not installed: No module named 'no_such_module'"
    assert quick["peers"]["absent"] == {"missing": absent}
    assert quick["peers"]["broken"] == {"missing": "RuntimeError: no kernel"}
    assert quick["peers"]["slow"] == {"missing": "left out: starts slowly"}


def test_ratio_under_the_floor_fails_a_run_that_is_not_quick(monkeypatch):
    times = {"ours": Time(10.0, 0.1), "peer": Time(30.0, 0.1)}
    monkeypatch.setattr(harness, "time_all", lambda runs, *_: times)
    contenders = {name: Contender(lambda: ONE) for name in times}
    contenders["absent"] = optional("no_such_module")
    compare(case(floors={"peer": 3.0, "absent": 5.0}), setup(**contenders), CPU)
    compare(case(floors={"peer": 3.1}), setup(**contenders), CPU, quick=True)
    with pytest.raises(AssertionError, match=r"a case: 3\.0x of peer, the floor is 3\.1x"):
        compare(case(floors={"peer": 3.1}), setup(**contenders), CPU)


def test_floor_between_two_peers(monkeypatch):
    """bfloat16 is one contender among others, and has a floor of its own."""
    times = {"ours": Time(10.0, 0.1), "bf16": Time(5.0, 0.1), "peer": Time(12.0, None)}
    monkeypatch.setattr(harness, "time_all", lambda runs, *_: times)
    contenders = {name: Contender(lambda: ONE) for name in times}
    contenders["absent"] = optional("no_such_module")
    floors = {("peer", "bf16"): 2.4, ("absent", "bf16"): 9.0, ("peer", "absent"): 9.0}
    compare(case(floors=floors), setup(**contenders), CPU)
    with pytest.raises(AssertionError, match=r"2\.4x of peer over bf16, the floor is 2\.5x"):
        compare(case(floors={("peer", "bf16"): 2.5}), setup(**contenders), CPU)


def test_a_contender_may_have_a_tolerance_of_its_own():
    coarse = Contender(wrong, check=within(atol=0.02))
    compare(case(), setup(ours=Contender(lambda: ONE), coarse=coarse), CPU, timed=False)
    coarse = Contender(wrong, check=within(atol=0.001))
    with pytest.raises(AssertionError, match="coarse"):
        compare(case(), setup(ours=Contender(lambda: ONE), coarse=coarse), CPU, timed=False)


def test_images_a_second_stand_in_record_and_table(monkeypatch):
    times = {"ours": Time(2000.0, 0.1), "peer": Time(4000.0, 0.1)}
    monkeypatch.setattr(harness, "time_all", lambda runs, *_: times)
    contenders = {name: Contender(lambda: ONE) for name in times}
    record = compare(case(images=16), setup(**contenders), CPU)
    assert (record["img_s"], record["peers"]["peer"]["img_s"]) == (8000, 4000)
    assert "peak_mib" not in record  # a CPU tells nothing of one contender
    page = records_table([record])
    assert "| img/s |" in page
    assert "| 8000 |" in page
    assert "peer 2x (4000 us, 4000 img/s)" in page
    assert "img/s" not in records_table([compare(case(), setup(**contenders), CPU)])


def test_peak_of_a_contender_leaves_out_what_others_hold(monkeypatch):
    """100 MiB stand there, 30 of them its own; a call goes up to 140."""
    mib = 2**20
    calls = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100 * mib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 140 * mib * len(calls))
    monkeypatch.setattr(harness, "time_all", lambda runs, *_: dict.fromkeys(runs, Time(10.0, 0.1)))
    monkeypatch.setattr(harness, "time_on_gpu", lambda *_: pytest.fail("not in a graph"))
    monkeypatch.setattr(harness, "agreeing", lambda case, setup, slow: setup.contenders)
    ours = Contender(lambda: calls.append(1), held=lambda: 30 * mib)
    contenders = {"ours": ours, "peer": Contender(lambda: ONE)}
    record = compare(case(in_graph=False), setup(**contenders), torch.device("cuda"))
    assert record["peak_mib"] == 70
    assert "peak_mib" not in record["peers"]["peer"]
    assert "MiB at peak" in records_table([record])


def test_what_a_training_holds():
    model = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    assert training_bytes(model, optimizer) == 32
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert training_bytes(model, optimizer) == 4 * 32 + 4  # gradient, two moments, their count


def test_a_slow_case_is_small_where_nothing_is_timed(monkeypatch):
    built = []

    def build(size):
        built.append(size)
        return setup(ours=Contender(lambda: ONE))

    slow = Case("slow", lambda: build("large"), small=lambda: build("small"))
    bench = types.SimpleNamespace(cases=lambda device, quick: [slow])
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: bench)
    monkeypatch.setattr(harness, "time_all", lambda runs, *_: dict.fromkeys(runs, Time(1.0, 0.1)))
    for timed in (False, True):
        list(harness.run_benchmark("any", CPU, timed=timed))
    assert built == ["small", "large"]


def test_record_of_a_gpu_tells_kernels_from_launches(monkeypatch):
    """A GPU is not needed to see what becomes of its times."""

    def on_gpu(run, seconds):
        if run is broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Time(us=2.0 if run is wrong else 4.0, spread=0.0)

    monkeypatch.setattr(harness, "time_all", lambda runs, *_: dict.fromkeys(runs, Time(10.0, 0.1)))
    monkeypatch.setattr(harness, "time_on_gpu", on_gpu)
    monkeypatch.setattr(harness, "measured_limits", lambda *_: Limits(1.0, 1.0))
    monkeypatch.setattr(harness, "agreeing", lambda case, setup, slow: setup.contenders)
    contenders = {
        "ours": Contender(wrong),
        "twice": Contender(lambda: ONE),
        "waits": Contender(lambda: ONE, waits=True),
        "broken": Contender(broken),
    }
    record = compare(case(bytes=1000), setup(**contenders), torch.device("cuda"))
    assert (record["us"], record["gpu_us"], record["gb_s"]) == (10.0, 2.0, 0.5)
    assert record["peers"]["twice"]["gpu_ratio"] == 2
    assert record["peers"]["waits"]["no_gpu_us"] == "waits for the GPU"
    assert record["peers"]["broken"]["no_gpu_us"].startswith("operation not permitted")


@pytest.mark.parametrize("subject", harness.subjects())
def test_cases_for_a_gpu_have_names_of_their_own_and_build_nothing_yet(subject):
    bench = importlib.import_module(f"benchmarks.bench_{subject}")
    names = [str(case) for case in bench.cases(torch.device("cuda"), False)]
    assert len(set(names)) == len(names) >= len(bench.cases(torch.device("cuda"), True)) > 0


def test_equality_alone_names_who_agrees():
    contenders = {"ours": Contender(lambda: ONE), "peer": Missing("not installed")}
    record = compare(case(), setup(**contenders), CPU, timed=False)
    assert record == {"case": "a case", "equal": "ours", "missing": "peer (not installed)"}


def test_subject_that_fails_is_an_error_and_leaves_a_record(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="no kernel"):
        compare(case(), setup(ours=Contender(broken)), CPU)
    bench = types.SimpleNamespace(
        cases=lambda device, quick: [
            Case("bad", lambda: setup(ours=Contender(broken))),
            Case("good", lambda: setup(ours=Contender(lambda: ONE))),
        ]
    )
    monkeypatch.setattr(harness.importlib, "import_module", lambda name: bench)
    bad, good = harness.run_benchmark("any", CPU, timed=False)
    assert bad == {"case": "bad", "error": "RuntimeError: no kernel\nfor this shape"}
    assert good["equal"] == "ours"
    assert "RuntimeError: no kernel" in capsys.readouterr().err


def test_command_line_refuses_an_unknown_benchmark(capsys):
    with pytest.raises(SystemExit):
        harness.main(["nothing"])
    assert "no benchmark 'nothing'; there are limits, assignment" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*kernel not used", "ignore:Both fused kernels")
def test_command_line_writes_records(tmp_path, capsys):
    file = tmp_path / "records.json"
    assert harness.main(["attention", "--quick", "--equality", "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert len(records) == 8
    assert all("detr_fast, SDPA" in record["equal"] for record in records)
    assert records[0]["case"] in capsys.readouterr().out


def test_calls_of_torch_are_counted_where_a_case_asks():
    one = torch.ones(3, requires_grad=True)
    runs = {
        "one op": Contender(lambda: one.detach() + 1),
        "backward": Contender(lambda: torch.autograd.grad((one + 1).sum(), one)[0] + 1),
    }
    case = Case("sum", lambda: None, within(rtol=1), count_ops=True)
    record = compare(case, Setup(lambda: torch.full((3,), 2.0), runs), CPU, quick=True)
    assert record["ops"] == 2
    assert record["peers"]["backward"]["ops"] > 3
    assert "one op, 2 ops" in records_table([record])


def test_scores_are_compared_with_the_clocks_of_a_gpu(monkeypatch):
    case = Case("attention", lambda: None, scores=10**6, scores_per_clock=2.0)
    setup = Setup(lambda: torch.ones(3), {"ours": Contender(lambda: torch.ones(3))})
    record = compare(case, setup, CPU, quick=True)
    assert record["scores_s"] == pytest.approx(1e12 / record["us"], rel=1e-3)
    assert "bound_share" not in record  # a CPU has no such bound
    monkeypatch.setattr(harness, "clocks_of_all_sms", lambda device: 1e9)
    record = compare(case, setup, CPU, quick=True)
    assert record["bound_share"] == pytest.approx(record["scores_s"] / 2e9, rel=1e-2)
    assert f"{record['bound_share']:.1%} of the bound" in records_table([record])


def test_a_case_computes_with_its_threads():
    seen = []
    threads = torch.get_num_threads()
    setup = Setup(lambda: 0, {"ours": Contender(lambda: seen.append(torch.get_num_threads()) or 0)})
    for case in (Case("one", lambda: setup), Case("all", lambda: setup, all_threads=True)):
        with harness.threads_of(case, torch.device("cpu")):
            compare(case, setup, torch.device("cpu"), timed=False)
    assert seen == [1, threads]
    assert torch.get_num_threads() == threads
