from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from casallm.config import (
    Config,
    build,
    load_yaml,
    merge,
    parse_overrides,
    parse_yaml,
    to_tree,
    to_yaml,
)
from casallm.errors import ConfigError


class Inner(Config):
    lr: float = Field(default=3e-4, gt=0)
    kind: Literal["adamw", "muon"] = "adamw"
    words: tuple[str, ...] = ()


class Outer(Config):
    inner: Inner = Inner()
    steps: int = 10
    width: int | None = None
    is_on: bool = True
    name: str = "x"


def test_scalars_are_read_by_the_type_of_their_field():
    tree = parse_yaml("{inner: {lr: 3e-4}, steps: 1_000, is_on: no, name: no}", where="here")

    built = build(Outer, tree)

    assert built == Outer(inner=Inner(lr=3e-4), steps=1000, is_on=False, name="no")


def test_overrides_read_lists_nulls_and_numbers():
    tree = parse_overrides(["inner.words=[a, b c]", "width=null", "steps=1e3"])

    assert build(Outer, tree) == Outer(inner=Inner(words=("a", "b c")), steps=1000)


def test_every_mistake_is_told_at_once_with_the_nearest_name():
    tree = parse_overrides(["inner.learning_rate=1", "inner.kind=adam", "stepz=5", "width=1.5"])

    with pytest.raises(ConfigError) as caught:
        build(Outer, tree)

    text = str(caught.value)
    assert "there is no setting stepz, did you mean steps?" in text
    assert "there is no setting inner.learning_rate" in text
    assert "inner.kind is 'adam'" in text
    assert "width is '1.5'" in text


def test_a_constraint_is_told_with_the_value_and_the_path():
    with pytest.raises(ConfigError, match=r"inner\.lr is '-1': input should be greater than 0"):
        build(Outer, parse_overrides(["inner.lr=-1"]))


def test_later_trees_win_and_sections_merge():
    merged = merge({"inner": {"lr": 1, "kind": "muon"}}, {"inner": {"lr": 2}, "steps": 3})

    assert merged == {"inner": {"lr": 2, "kind": "muon"}, "steps": 3}


@given(
    st.builds(
        Outer,
        inner=st.builds(
            Inner,
            lr=st.floats(1e-9, 1e9),
            words=st.lists(st.text(st.characters(blacklist_categories=["Cs", "Cc"]))).map(tuple),
        ),
        steps=st.integers(-(2**53), 2**53),
        width=st.none() | st.integers(-9, 9),
        is_on=st.booleans(),
        name=st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1),
    )
)
def test_written_yaml_builds_the_same_config(config):
    text = to_yaml(to_tree(config))

    assert build(Outer, parse_yaml(text, where="here")) == config


@pytest.mark.parametrize("assignment", ["steps", "=5", "inner..lr=1", ".=1"])
def test_what_is_no_assignment_is_refused(assignment):
    with pytest.raises(ConfigError, match=r"write it as section\.key=value"):
        parse_overrides([assignment])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_yaml(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_yaml(broken)
