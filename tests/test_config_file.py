# SPDX-License-Identifier: Apache-2.0
"""Flags from a YAML file, below those of the command line."""

import pytest

from detr_fast.command_line import parse
from detr_fast.config import UsageError, configure


@pytest.fixture
def flags(tmp_path):
    def read(text, line=""):
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return parse("train.py", "", ["--config", str(file), *line.split()])

    return read


def test_a_file_gives_what_the_command_line_leaves_out(flags):
    text = "lr: 2e-4\nepochs: 7\ndata_path: my data\nno_aux_loss: true\nbackbone: resnet101\n"
    given = flags(text, "--epochs 3")
    assert given == {
        "lr": 2e-4,
        "epochs": 3,
        "coco_path": "my data",
        "aux_loss": False,
        "backbone": "resnet101",
    }
    assert configure(given).lr == 2e-4


def test_words_that_yaml_takes_for_truths(flags):
    assert flags("amp: off\ncompile: on\n") == {"amp": "off", "compile": "on"}


def test_a_switch_goes_off_again(flags):
    text = "no_aux_loss: true\ndeterministic: yes\n"
    assert flags(text) == {"aux_loss": False, "deterministic": True}
    given = flags(text, "--no_aux_loss false --deterministic false")
    assert given == {"aux_loss": True, "deterministic": False}


def test_an_empty_file_says_nothing(flags):
    assert flags("# nothing\n", "--seed 3") == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1\n", "there is no flag 'learning_rate'"),
        ("epoch: 1\n", "there is no flag 'epoch': epochs?"),
        ("config: other.yaml\n", "there is no flag 'config'"),
        ("epochs: many\n", "argument --epochs: invalid int value: 'many'"),
        ("epochs: 1.5\n", "argument --epochs: invalid int value: '1.5'"),
        ("epochs: [1, 2]\n", r"epochs: expected one number or word, found \[1, 2\]"),
        ("seed:\n", "seed: expected one number or word, found None"),
        ("backbone: vgg\n", "argument --backbone: invalid choice: 'vgg'"),
        ("deterministic: maybe\n", "argument --deterministic: expected true or false, got 'maybe'"),
        ("- lr\n- 1\n", "expected lines such as 'lr: 2e-4', found a list"),
        ("lr: {\n", "is no YAML: .*line 2"),
        ("lr: !!python/object/apply:os.system ['true']\n", "is no YAML: could not determine"),
    ],
)
def test_mistakes_name_the_file_and_the_line(flags, text, message):
    with pytest.raises(UsageError, match=rf"--config .*run\.yaml: {message}"):
        flags(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml: No such file"):
        parse("train.py", "", ["--config", str(tmp_path / "nowhere.yaml")])


def test_a_file_that_is_no_text(tmp_path):
    (file := tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UsageError, match="is no text in UTF-8"):
        parse("train.py", "", ["--config", str(file)])
