from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import pytest
import torch
from medsr.engines.case_evaluator import CaseDataset, CaseEvaluator, named, one_line
from medsr.errors import DataError, GeometryError, MedsrError, OutputError
from monai.data import DataLoader
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import Tensor, nn

CASES = ("a", "b", "c", "d")


def load(item: dict[str, Any]) -> dict[str, Any]:
    if item["image"] == "unreadable":
        raise DataError("b.nii.gz: truncated; copy it again")
    return {**item, "image": torch.full((1, 4, 4, 4), float(len(item["image"])))}


class Network(nn.Module):
    def __init__(self, fault: type[BaseException] | None = None) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        if self.fault is not None and self.calls == 2:
            raise self.fault("second\nline two")
        return image * 2


class Keeper:
    """Saves in memory what the handlers of a case see."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse, self.seen = refuse, {}

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(IterationEvents.MODEL_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        for item in engine.state.output:
            case = item["case"] if "case" in item else engine.state.batch[0]["case"]
            if case == self.refuse:
                raise OutputError(f"{case}_superres.nii.gz: cannot be written (disk full); nothing was saved")
            self.seen[case] = float(item["pred"].mean())


def evaluate(unreadable: str = "", *, network: Network | None = None, keeper: Keeper | None = None):
    data = [{"image": "unreadable" if case == unreadable else "x", "case": case} for case in CASES]
    evaluator = CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset(data, load), batch_size=1),
        network=network or Network(),
        inferer=SimpleInferer(),
        postprocessing=lambda item: item,
        val_handlers=[keeper or Keeper()],
    )
    evaluator.run()
    return evaluator


def test_all_good_cases_leave_no_failure():
    keeper = Keeper()
    assert evaluate(keeper=keeper).failures == {}
    assert keeper.seen == dict.fromkeys(CASES, 2.0)


def test_an_unreadable_case_is_recorded_and_the_others_go_on(caplog):
    keeper, network = Keeper(), Network()
    with caplog.at_level(logging.ERROR):
        evaluator = evaluate("b", keeper=keeper, network=network)
    assert evaluator.failures == {"b": "b.nii.gz: truncated; copy it again"}
    assert sorted(keeper.seen) == ["a", "c", "d"]
    assert network.calls == 3
    assert [r.getMessage() for r in caplog.records] == ["b.nii.gz: truncated; copy it again"]


@pytest.mark.parametrize("fault", [ValueError, MemoryError, RuntimeError, GeometryError])
def test_a_case_that_fails_in_the_network_is_recorded_and_the_others_go_on(fault, caplog):
    keeper = Keeper()
    with caplog.at_level(logging.ERROR):
        evaluator = evaluate(keeper=keeper, network=Network(fault))
    assert list(evaluator.failures) == ["b"]
    assert "\n" not in evaluator.failures["b"]
    assert "second" in evaluator.failures["b"]
    assert sorted(keeper.seen) == ["a", "c", "d"]
    assert caplog.records[-1].getMessage() == f"b: {evaluator.failures['b']}"


def test_a_case_that_cannot_be_saved_is_recorded_too():
    keeper = Keeper("c")
    failures = evaluate(keeper=keeper).failures
    assert failures == {"c": "c_superres.nii.gz: cannot be written (disk full); nothing was saved"}
    assert sorted(keeper.seen) == ["a", "b", "d"]


def test_a_failed_case_leaves_nothing_of_the_case_before():
    outputs = []
    keeper = Keeper()

    class Spy:
        def attach(self, engine: Any) -> None:
            from ignite.engine import Events

            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output))

    data = [{"image": "x", "case": "a"}, {"image": "unreadable", "case": "b"}]
    CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(CaseDataset(data, load), batch_size=1),
        network=Network(),
        val_handlers=[keeper, Spy()],
    ).run()
    assert outputs[0]
    assert outputs[1] == {}


def test_ctrl_c_is_no_bad_case():
    with pytest.raises(KeyboardInterrupt):
        evaluate(network=Network(KeyboardInterrupt))


def test_a_dataset_item_keeps_its_case_and_the_reason():
    dataset = CaseDataset([{"image": "unreadable", "case": "b"}, {"image": "x", "case": "a"}], load)
    assert dataset[0] == {"case": "b", "error": "b.nii.gz: truncated; copy it again"}
    assert dataset[1]["case"] == "a"
    assert "error" not in dataset[1]


def raised(*errors: BaseException, by: str = "cause") -> BaseException:
    """The last of a chain of errors, each raised from (or while handling) the one before."""
    for before, after in pairwise(errors):
        setattr(after, f"__{by}__", before)
    return errors[-1]


@pytest.mark.parametrize("by", ["cause", "context"])
def test_the_line_is_that_of_the_error_of_ours(by):
    ours = DataError("x.nii: bad\n  header;  repair it")
    chain = raised(KeyError("k"), ours, RuntimeError("applying transform <Load>\nmore"), by=by)
    assert one_line(chain) == "x.nii: bad header; repair it"


def test_without_an_error_of_ours_it_is_the_innermost():
    chain = raised(ZeroDivisionError("division by zero\nsecond line"), RuntimeError("applying transform"))
    assert one_line(chain) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("error", [ValueError(), ValueError("\n\n"), MedsrError("x")])
def test_there_is_always_exactly_one_line(error):
    line = one_line(error)
    assert line
    assert len(line.splitlines()) == 1


def test_a_chain_that_bites_its_tail_ends():
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert one_line(first) == "ValueError: b"


def test_a_case_that_is_known_to_be_bad_is_passed_on_with_its_reason():
    dataset = CaseDataset([{"image": "x", "case": "a", "error": "a: there is no right view"}], load)
    assert dataset[0] == {"case": "a", "error": "a: there is no right view"}


@pytest.mark.parametrize(
    ("case", "reason", "line"),
    [
        (
            "a",
            "the network gave values that are not finite",
            "a: the network gave values that are not finite",
        ),
        ("a", "a.nii.gz: truncated", "a.nii.gz: truncated"),
        ("pair", "pair: there is no right view", "pair: there is no right view"),
        ("pair", "pair_left.png: empty file", "pair: pair_left.png: empty file"),
        ("a", "a shift of 40 rows leaves nothing", "a: a shift of 40 rows leaves nothing"),
    ],
)
def test_every_reason_names_its_case(case, reason, line):
    assert named(case, reason) == line
