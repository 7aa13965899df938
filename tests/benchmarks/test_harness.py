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
def test_command_line_writes_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "one_thread", lambda device: None)
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
