import copy
import json
import pickle

import pytest
from torch import nn

from modelopt_ext.plan import LinearPlan, SegmentPlan, fold_names


def sample_plan() -> SegmentPlan:
    return SegmentPlan(
        linears={
            "blocks.0.norm": LinearPlan((8,), (8,) * 6, ("silu",)),
            "blocks.0.q": LinearPlan.trivial(8, 8),
            "blocks.0.k": LinearPlan.trivial(8, 8),
            "blocks.1.norm": LinearPlan((8,), (8,) * 6, ("silu",)),
            "out": LinearPlan((8, 32), (8,), ("", "gelu")),
        },
        shared_inputs=(("blocks.0.q", "blocks.0.k"),),
        uncalled=("spare",),
        notes={"blocks.0.q": "strided"},
        convs={"up.conv": (4, 12)},
    )


# -- LinearPlan --------------------------------------------------------------------------------------------------------


def test_linear_plan_geometry():
    plan = LinearPlan((8, 24), (3, 5, 8), ("", "gated"))
    assert (plan.in_features, plan.out_features) == (32, 16)
    assert plan.in_slices == (slice(0, 8), slice(8, 32))
    assert plan.out_slices == (slice(0, 3), slice(3, 8), slice(8, 16))
    assert str(plan) == "8 + 24:gated -> 3 + 5 + 8"


def test_trivial_means_no_cut_and_no_tag():
    assert LinearPlan.trivial(8, 16).is_trivial
    assert LinearPlan((8,), (16,)).activations == ("",)
    assert not LinearPlan((8,), (16,), ("silu",)).is_trivial
    assert not LinearPlan((4, 4), (16,)).is_trivial
    assert not LinearPlan((8,), (8, 8)).is_trivial


def test_lists_become_tuples():
    assert LinearPlan([4, 4], [8], ["", "silu"]) == LinearPlan((4, 4), (8,), ("", "silu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), (8,)), "in_segments is empty"),
        (((8,), (8, 0)), "out_segments has 0"),
        (((8,), (8, -1)), "out_segments has -1"),
        (((8.0,), (8,)), "in_segments has 8.0"),
        (((True,), (8,)), "in_segments has True"),
        ((8, (8,)), r"write a tuple, such as \(8,\)"),
        (((8,), (8,), ("", "silu")), "2 tags for 1 input segments"),
        (((8,), (8,), ("relu",)), "'relu' is unknown; use one of '', 'silu', 'gelu', 'gated'"),
        (((8,), (8,), "silu"), r"write \('silu',\)"),
    ],
)
def test_linear_plan_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearPlan(*arguments)


def test_linear_plan_dict_is_strict():
    plan = LinearPlan((8, 24), (16,), ("", "gelu"))
    assert LinearPlan.from_dict(plan.to_dict()) == plan
    with pytest.raises(ValueError, match="missing key 'out_segments'"):
        LinearPlan.from_dict({"in_segments": [8]})
    with pytest.raises(ValueError, match="unknown key 'outsegments'"):
        LinearPlan.from_dict({"in_segments": [8], "out_segments": [8], "outsegments": [8]})


# -- SegmentPlan: values, JSON, files ----------------------------------------------------------------------------------


def test_json_round_trip_of_plain_types(tmp_path):
    plan = sample_plan()
    assert SegmentPlan.from_json(plan.to_json()) == plan

    def types(value):
        if isinstance(value, dict):
            return {dict} | {t for item in (*value, *value.values()) for t in types(item)}
        return {list} | {t for item in value for t in types(item)} if isinstance(value, list) else {type(value)}

    assert types(plan.to_dict()) == {dict, list, str, int}
    plan.save(tmp_path / "plan.json")
    assert SegmentPlan.load(tmp_path / "plan.json") == plan


def test_plan_survives_pickle_and_deepcopy():
    plan = sample_plan()
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99, this package reads 1"),
        ({"format": "other"}, "not a segment plan"),
        ({"surplus": 1}, "unknown key 'surplus'"),
        ({"linears": {"out": {"in_segments": [0], "out_segments": [8]}}}, "'out': in_segments has 0"),
    ],
)
def test_bad_json_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SegmentPlan.from_json(json.dumps(sample_plan().to_dict() | change))


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(sample_plan().to_json()[:100])
    with pytest.raises(ValueError, match=r"plan\.json: not a segment plan"):
        SegmentPlan.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"uncalled": ("out",)}, "both in linears and in uncalled"),
        ({"shared_inputs": (("out",),)}, "fewer than two names"),
        ({"shared_inputs": (("out", "nowhere"),)}, "'nowhere' is not in linears"),
        ({"convs": {"conv": ()}}, "convs"),
    ],
)
def test_segment_plan_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        SegmentPlan(linears={"out": LinearPlan.trivial(8, 8)}, **fields)


def test_groups_are_sorted():
    linears = dict.fromkeys("abcd", LinearPlan.trivial(8, 8))
    plan = SegmentPlan(linears=linears, shared_inputs=(("d", "c"), ("b", "a")))
    assert plan.shared_inputs == (("a", "b"), ("c", "d"))


# -- text --------------------------------------------------------------------------------------------------------------


def test_table_folds_blocks_and_reports_everything():
    assert str(sample_plan()).splitlines() == [
        "module             count  in           out",
        "-----------------  -----  -----------  -------------",
        "blocks.{0-1}.norm  2      8:silu       6 x 8",
        "out                1      8 + 32:gelu  8",
        "up.conv            1      4 + 12       (convolution)",
        "5 Linears: 2 with output segments, 1 with input segments, 3 with polar inputs, "
        "1 groups that share an input; 1 convolutions of concatenated channels; 1 Linears never called",
        "note: blocks.0.q: strided",
        "never called, no segments: spare",
    ]
    assert "blocks.0.k" in sample_plan().table(trivial=True)


def test_fold_names_is_exact():
    assert fold_names(["b.0.x", "b.1.x", "b.2.x", "b.4.x", "y"]) == "b.{0-2,4}.x, y"
    # Not a product of two ranges: {0-1}.{0-1} would name four.
    assert fold_names(["b.0.c.1", "b.1.c.0"]) == "b.0.c.1, b.1.c.0"
    assert fold_names(["b.0.c.0", "b.0.c.1", "b.1.c.0", "b.1.c.1"]) == "b.{0-1}.c.{0-1}"
    assert fold_names(["conv1", "conv2"]) == "conv1, conv2"


# -- overrides and checks ----------------------------------------------------------------------------------------------


def test_override_by_pattern_and_in_order():
    plan = sample_plan().with_overrides({"*.norm": {"out_segments": (24, 24)}, "blocks.1.norm": None})
    assert plan.linears["blocks.0.norm"] == LinearPlan((8,), (24, 24), ("silu",))
    assert plan.linears["blocks.1.norm"].is_trivial
    assert sample_plan().linears["blocks.0.norm"].out_segments == (8,) * 6  # the original is a value


def test_override_of_inputs_carries_tags():
    plan = sample_plan().with_overrides({"out": {"in_segments": (4, 4, 16, 16)}})
    assert plan.linears["out"].activations == ("", "", "gelu", "gelu")
    plan = sample_plan().with_overrides({"out": {"in_segments": (20, 20)}})
    assert plan.linears["out"].activations == ("", "gelu")
    plan = sample_plan().with_overrides({"out": {"activations": ("", "")}})
    assert plan.linears["out"] == LinearPlan((8, 32), (8,))


def test_override_with_a_whole_plan_keeps_the_rest():
    new = LinearPlan((40,), (4, 4))
    plan = sample_plan().with_overrides({"out": new})
    assert plan.linears["out"] is new
    assert plan.shared_inputs == sample_plan().shared_inputs
    assert plan.notes == sample_plan().notes


def test_override_plans_an_uncalled_linear():
    plan = sample_plan().with_overrides({"spare": {"in_segments": (8,), "out_segments": (4, 4)}})
    assert plan.linears["spare"] == LinearPlan((8,), (4, 4))
    assert plan.uncalled == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"nowhere": None}, "'nowhere' names no Linear of the plan"),
        ({"*.nowhere": None}, r"'\*.nowhere' names no Linear"),
        ({"out": {"in_segments": (8, 31)}}, "'out': in_segments .* add up to 39, the Linear has 40"),
        ({"out": LinearPlan((40,), (9,))}, "'out': out_segments .* add up to 9, the Linear has 8"),
        ({"out": {"activations": ("silu",)}}, "'out': activations has 1 tags for 2"),
        ({"out": {"segments": (8,)}}, "'out': unknown key 'segments'"),
        ({"out": {"out_segments": 8}}, "out_segments is 8"),
        ({"out": 8}, "override of 'out' is a mapping"),
        ({"spare": {"in_segments": (8,)}}, "'spare': the recording never called this Linear"),
    ],
)
def test_bad_override_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        sample_plan().with_overrides(overrides)


def test_check_names_every_module_that_does_not_fit():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.LayerNorm(8), "conv": nn.Conv2d(4, 4, 1)})
    SegmentPlan(linears={"a": LinearPlan((4, 4), (8,))}, convs={"conv": (2, 2)}).check(model)
    linears = {"a": LinearPlan.trivial(8, 9), "b": LinearPlan.trivial(8, 8), "c": LinearPlan.trivial(8, 8)}
    with pytest.raises(ValueError, match="does not fit this ModuleDict") as error:
        SegmentPlan(linears=linears, convs={"conv": (4, 4)}).check(model)
    assert "a: 8 -> 8 features, planned 8 -> 9" in str(error.value)
    assert "b: a LayerNorm, not a Linear" in str(error.value)
    assert "c: no such module" in str(error.value)
    assert "conv: 4 input channels, planned 8" in str(error.value)
