from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.errors import TriviumError
from trivium.train import config
from trivium.train.config import Config
from trivium.train.optim import Optim


@dataclass(frozen=True)
class Rate:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.98)
    schedule: Literal["cosine", "constant"] = "cosine"
    freeze: tuple[str, ...] = ()


@dataclass
class Data:
    folder: Path = Path("pictures")
    limit: int | None = None
    columns: list[str] = field(default_factory=lambda: ["text"])
    micro_batch: int | Literal["auto"] = 32
    shuffle: bool = True


@dataclass
class Member:
    name: str = "pairs"
    ratio: float = 0.7


@dataclass
class Tree:
    rate: Rate = field(default_factory=Rate)
    data: Data = field(default_factory=Data)
    members: tuple[Member, ...] = (Member(), Member("text", 0.3))
    weights: dict[str, float] = field(default_factory=lambda: {"mim": 1.0, "itm": 0.5})


def test_leaves_name_everything_once() -> None:
    found = config.leaves(Tree())
    assert found["rate.betas"] == [0.9, 0.98]
    assert found["members.1.name"] == "text"
    assert found["weights.itm"] == 0.5
    assert found["data.folder"] == "pictures"
    assert found["data.limit"] is None
    assert len(found) == 4 + 5 + 2 * 2 + 2
    assert json.loads(json.dumps(found)) == found


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rate.lr": st.floats(allow_nan=False),
            "rate.betas": st.tuples(st.floats(0, 1), st.floats(0, 1)).map(list),
            "rate.schedule": st.sampled_from(["cosine", "constant"]),
            "rate.freeze": st.lists(st.text()),
            "data.limit": st.none() | st.integers(),
            "data.columns": st.lists(st.text()),
            "data.micro_batch": st.integers() | st.just("auto"),
            "data.shuffle": st.booleans(),
            "members.0.ratio": st.floats(0, 1),
            "weights.mim": st.floats(0, 9),
        },
    )
)
def test_any_values_survive_a_round_trip(values: dict) -> None:
    tree = config.set_leaves(Tree(), json.loads(json.dumps(values)))
    assert config.leaves(tree) == {**config.leaves(Tree()), **values}
    again = config.set_leaves(Tree(), config.leaves(tree))
    assert again == tree
    assert isinstance(again.rate.betas, tuple)
    assert isinstance(again.data.folder, Path)


def test_the_given_tree_is_not_touched() -> None:
    tree = Tree()
    config.set_leaves(tree, {"rate.lr": 1.0, "members.0.ratio": 0.1, "weights.mim": 9})
    assert tree == Tree()


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("rate.lrr", 1.0, "the recipe has no option rate.lrr: did you mean rate.lr?"),
        ("lr", 1.0, "the recipe has no option lr: did you mean rate.lr?"),
        ("rate", 1.0, "rate is a group of options: set one of them, such as rate.lr"),
        ("members.2.name", "x", "the recipe has no option members.2.name: did you mean members.1.name?"),
        ("zzz", 1, "the recipe has no option zzz"),
        ("rate.lr", "fast", 'rate.lr takes a number, not "fast"'),
        ("rate.lr", True, "rate.lr takes a number, not true"),
        ("rate.betas", [0.9], "rate.betas takes a list of 2 values (a number, a number), not [0.9]"),
        ("rate.schedule", "cosin", 'rate.schedule takes "cosine" or "constant", not "cosin"'),
        ("rate.freeze", "image*", 'rate.freeze takes a list, each a string, not "image*"'),
        ("data.limit", 1.5, "data.limit takes a whole number or null, not 1.5"),
        ("data.shuffle", 1, "data.shuffle takes true or false, not 1"),
        ("data.micro_batch", "many", 'data.micro_batch takes a whole number or "auto", not "many"'),
        ("data.folder", 3, "data.folder takes a path, not 3"),
    ],
)
def test_a_mistake_gives_one_sentence(path: str, value: object, sentence: str) -> None:
    with pytest.raises(TriviumError) as caught:
        config.set_leaves(Tree(), {path: value})
    assert str(caught.value) == sentence


def test_whole_numbers_are_numbers() -> None:
    written = Tree(Rate(lr=1), weights={"mim": 1, "itm": 0})
    assert json.dumps(config.leaves(written)["rate.lr"]) == "1.0"  # one configuration, one digest
    assert config.leaves(written) == config.leaves(config.set_leaves(written, config.leaves(written)))
    assert config.set_leaves(written, {"weights.itm": 0.5}).weights == {"mim": 1, "itm": 0.5}
    with pytest.raises(TriviumError, match=r'weights\.itm takes a number, not "x"'):
        config.set_leaves(written, {"weights.itm": "x"})
    lr = config.set_leaves(Tree(), {"rate.lr": 1}).rate.lr
    assert lr == 1.0
    assert type(lr) is float


def test_save_and_load(tmp_path: Path) -> None:
    before = Config("flava", {"size": "tiny"}, config.leaves(Tree()))
    config.save(before, tmp_path / "config.json")
    assert config.load(tmp_path) == before
    assert config.load(tmp_path / "config.json").digest() == before.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert dataclasses.replace(before, recipe="clip").digest() != before.digest()


@pytest.mark.parametrize("content", ["", "[1]", '{"recipe": "flava"}', '{"recipe": 1, "arguments": {}, "values": {}}'])
def test_a_broken_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(TriviumError, match=r"config\.json"):
        config.load(tmp_path)


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "my_run.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Shop:\n"
        "    shelves: int = 3\n"
        "def shop(size: str = 'tiny') -> Shop:\n"
        "    return Shop(9 if size == 'big' else 3)\n"
    )
    name = f"{file}:shop"
    assert config.build(Config(name, {"size": "big"}), {}).shelves == 9
    assert config.build(Config(name, {}, {"shelves": 5}), {}).shelves == 5
    with pytest.raises(TriviumError, match="shelves takes a whole number"):
        config.build(Config(name, {}, {"shelves": "many"}), {})
    with pytest.raises(TriviumError, match="has no function shops"):
        config.find_recipe(name + "s", {})
    with pytest.raises(TriviumError, match="does not take these arguments"):
        config.build(Config(name, {"colour": "red"}), {})


def test_an_unknown_recipe() -> None:
    with pytest.raises(TriviumError, match="there is no recipe flavva: did you mean flava"):
        config.find_recipe("flavva", {"flava": Tree})
    with pytest.raises(TriviumError, match="no such file"):
        config.find_recipe("absent.py:shop", {"flava": Tree})


def test_members_that_the_function_does_not_start_from_come_back() -> None:
    from trivium.cli.demo import demo_recipe
    from trivium.recipes.flava import flava
    from trivium.train.config import leaves, set_leaves
    from trivium.train.optim import Group

    demo = demo_recipe(1.0)
    assert demo.optim.groups
    values = leaves(demo)
    assert set_leaves(flava("tiny"), values) == demo
    later = {
        "optim.groups.0.pattern": "text.*",
        "optim.groups.0.weight_decay": 0.5,
        "optim.groups.1.pattern": "image.*",
    }
    assert set_leaves(flava("tiny"), later).optim.groups == (Group("text.*", weight_decay=0.5), Group("image.*"))
    for lacking in (
        {"optim.groups.0.rate": 2.0},
        {"optim.groups.1.pattern": "text.*"},
        {**later, "optim.groups.0.rat": 1.0},
    ):
        with pytest.raises(TriviumError, match=r"has no option optim\.groups"):
            set_leaves(flava("tiny"), lacking)


def test_a_list_of_members_is_told_by_their_fields() -> None:
    said = "groups takes a list, each with fields of its own (pattern, rate, weight_decay, freeze_until), not 5"
    with pytest.raises(TriviumError, match=re.escape(said)):
        config.set_leaves(Optim(), {"groups": 5})
