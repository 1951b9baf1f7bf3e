"""MMBench in any language (Liu et al., 2023, arXiv:2307.06281): multiple choice in a table with embedded images.

A question is asked several times with its options rotated, and counts as right when all times are ("circular
evaluation"). The official tables hold rotated copies as rows of their own, whose index is larger by multiples of a
million; `..._all_rounds` splits rotate each row as LLaVA's --all-rounds does. LLaVA scores nothing here: it uploads.
The score here reads the option from the answer by rules alone, where the official one goes on to ask a language model.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import xlsxwriter

from llava_saep.errors import UserError

from ._base import (
    LONG_ANSWER_TOKENS,
    Answer,
    EmbeddedImage,
    Requirement,
    Task,
    TaskQuestion,
    TaskResult,
)
from ._files import read_text, writing
from ._matching import match_answers, texts_by_id
from ._options import check_letter_labels, list_options, read_letter
from ._scoring import grouped, mean_metric, mean_rows
from ._sources import OPTION_LETTER

OPTION_LETTER_CN = "请直接回答选项字母。"
LETTERS = ("A", "B", "C", "D")
ALL_ROUNDS = "_all_rounds"
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6
"""Where LLaVA inserts the predictions, counted from 0 among the columns that are left."""
COPY_STEP = 1_000_000
"""Rotated copies of a row have its index plus multiples of this."""
MAX_CELL_CHARACTERS = 32_767
"""What a cell of an xlsx table can hold."""

# What pandas.read_table takes for an empty cell; LLaVA reads the table with it, so an option "None" does not exist.
_EMPTY_CELLS = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
    + ["NULL", "NaN", "None", "n/a", "nan", "null"]
)

_NO_XML = dict.fromkeys((0xFFFE, 0xFFFF), "\ufffd")
"""Characters of no XML file, which xlsxwriter lets through; it escapes the control characters."""
_INDEX = re.compile(r"[0-9]{1,18}")

Row = Mapping[str, str | None]


def is_none(value: Any) -> bool:
    """Whether a cell holds nothing, as LLaVA sees it: also `nan` and `none` in any case."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return isinstance(value, str) and value.lower() in ("nan", "none")


def row_options(row: Row) -> list[str]:
    """The options of a row, up to the first empty one."""
    options: list[str] = []
    for letter in LETTERS:
        value = row.get(letter)
        if value is None or is_none(value):
            break
        options.append(value)
    return options


def read_table(path: Path) -> list[dict[str, str | None]]:
    """Rows of a tab-separated table, empty cells as None.

    Raises:
        UserError: the file is absent, lacks `index` or `question`, or a row has another number of cells.
    """
    with _cells_with_images():
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), dialect="excel-tab")
        rows = [(reader.line_num, row) for row in reader]
    missing = {"index", "question", "A", "image"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path}: lacks the columns {', '.join(sorted(missing))}; is it MMBench's table?")
    for line, row in rows:
        if None in row or any(value is None for value in row.values()):
            raise UserError(f"{path}, line {line}: has not {len(row)} cells, as the first line; is the file complete?")
        if not _INDEX.fullmatch(row["index"]):
            raise UserError(f"{path}, line {line}: index must be a number, found {row['index']!r}")
    return [{name: None if value in _EMPTY_CELLS else value for name, value in row.items()} for _, row in rows]


@contextmanager
def _cells_with_images() -> Iterator[None]:
    """Let csv read cells of any length; the limit is one for the process."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def table_questions(
    path: Path, *, all_rounds: bool = False, ask_for_letter: bool = True, language: str = "en"
) -> list[TaskQuestion]:
    """Questions of a table, one per row or, with `all_rounds`, one per row and rotation of its options.

    The stored prompt is without the instruction, as in LLaVA's model_vqa_mmbench; `options` and `option_char` go into
    the answer line: what stood at each place, and its letter in the table.
    """
    return [
        question for row in read_table(path) for question in _rounds(row, path, all_rounds, ask_for_letter, language)
    ]


def _rounds(row: Row, path: Path, all_rounds: bool, ask_for_letter: bool, language: str) -> Iterator[TaskQuestion]:
    options, letters = row_options(row), list(LETTERS)
    letters = letters[: len(options)]
    index = int(row["index"] or 0)
    image = EmbeddedImage(row["image"] or "", f"{path}, index {index}")
    question = row["question"] or ""
    if not is_none(row.get("hint")):
        question = f"{row['hint']}\n{question}"
    instruction = OPTION_LETTER_CN if language == "cn" else OPTION_LETTER
    for round_id in range(len(options) if all_rounds else 1):
        prompt = list_options(question, options)
        yield TaskQuestion(
            question_id=index,
            text=f"{prompt}\n{instruction}" if ask_for_letter else prompt,
            prompt=prompt,
            images=(image,),
            category=row.get("category") or "default",
            answer_fields={"round_id": round_id, "options": options, "option_char": letters},
        )
        options, letters = options[1:] + options[:1], letters[1:] + letters[:1]


def predicted_letter(question: TaskQuestion, text: str) -> str | None:
    """The option's letter in the table that an answer means; None when it means none."""
    options, letters = question.answer_fields["options"], question.answer_fields["option_char"]
    letter = read_letter(text, options)
    return None if letter is None else letters[LETTERS.index(letter)]


def predictions_by_index(answers: Iterable[Answer]) -> dict[int, str]:
    """Generated text by index; the last one counts, and what is no index is left out."""
    return {int(id_): text for id_, text in texts_by_id(answers).items() if _INDEX.fullmatch(id_)}


def upload_table(rows: Sequence[Row], predictions: Mapping[int, str]) -> list[list[str | int | None]]:
    """Header and rows of the official upload: the table's short columns with the predictions among them.

    Args:
        predictions: answer by index; None stands where there is none.
    """
    names: list[str] = [name for name in (rows[0] if rows else ()) if name not in NOT_UPLOADED]
    table: list[list[str | int | None]] = [[*names[:PREDICTION_COLUMN], "prediction", *names[PREDICTION_COLUMN:]]]
    for row in rows:
        index = int(row["index"] or 0)
        cells: list[str | int | None] = [index if name == "index" else row[name] for name in names]
        table.append([*cells[:PREDICTION_COLUMN], predictions.get(index), *cells[PREDICTION_COLUMN:]])
    return table


def write_xlsx(path: Path, table: Sequence[Sequence[str | int | None]]) -> Path:
    """Write a table with texts as they are: none becomes a formula, a link or a number.

    Raises:
        UserError: a text is longer than a cell can be, or the file cannot be written.
    """
    for number, row in enumerate(table):
        too_long = [len(cell) for cell in row if isinstance(cell, str) and len(cell) > MAX_CELL_CHARACTERS]
        if too_long:
            raise UserError(
                f"{path}, row {number}: a text of {too_long[0]} characters; a cell holds {MAX_CELL_CHARACTERS}"
            )
    content = io.BytesIO()
    with xlsxwriter.Workbook(content) as workbook:
        sheet = workbook.add_worksheet()
        for number, row in enumerate(table):
            for column, cell in enumerate(row):
                if isinstance(cell, str) and cell:
                    sheet.write_string(number, column, cell.translate(_NO_XML))
                elif isinstance(cell, int):
                    sheet.write_number(number, column, cell)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    return path


class MMBenchTask(Task):
    """MMBench's tables of one language. Splits are tables, and the same with all rounds."""

    language: ClassVar[str]
    tables: ClassVar[Mapping[str, str]]
    default_splits = ("dev",)
    max_new_tokens = LONG_ANSWER_TOKENS

    def _table(self, folder: Path, split: str) -> Path:
        return folder / self.tables[split.removesuffix(ALL_ROUNDS)]

    def requirements(self, folder: Path, split: str) -> list[Requirement]:
        """The table, which holds the images too."""
        path = self._table(folder, split)
        site = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
        return [Requirement(path=path, source=f"{site}/{path.name}")]

    def questions(self, folder: Path, split: str) -> list[TaskQuestion]:
        """Rows of the table, with hint, options and the instruction to answer with a letter."""
        return table_questions(
            self._table(folder, split), all_rounds=split.endswith(ALL_ROUNDS), language=self.language
        )

    def score(self, folder: Path, split: str, answers: Sequence[Answer]) -> TaskResult:
        """Circular and single-pass accuracy on dev, and circular accuracy by category."""
        if not self.has_labels(split):
            raise UserError(f"{self.name}:{split}: the labels are hidden; upload the xlsx file to MMBench's server")
        path = self._table(folder, split)
        truths = {int(row["index"] or 0): row.get("answer") for row in read_table(path)}
        check_letter_labels(truths, LETTERS, str(path))
        questions = self.questions(folder, split)
        matched = match_answers(questions, answers)
        letters = [
            None if text is None else predicted_letter(question, text)
            for question, text in zip(questions, matched.texts, strict=True)
        ]
        is_right = [
            letter == truths[int(question.question_id)] for question, letter in zip(questions, letters, strict=True)
        ]
        unread = sum(letter is None and text is not None for letter, text in zip(letters, matched.texts, strict=True))
        return TaskResult(
            task=self.name,
            split=split,
            **_circular(questions, is_right),
            exclusions=matched.exclusions,
            notes=(f"answers that name none of the options, counted as wrong: {unread}",),
        )

    def export(self, folder: Path, split: str, answers: Sequence[Answer], output: Path) -> list[Path]:
        """The xlsx file that MMBench's server takes; it holds the first round's answers."""
        path = self._table(folder, split)
        predictions = predictions_by_index(answer for answer in answers if answer.round_id == 0)
        return [write_xlsx(output / f"{path.stem}.xlsx", upload_table(read_table(path), predictions))]


def _circular(questions: Sequence[TaskQuestion], is_right: Sequence[bool]) -> dict[str, Any]:
    """Metrics and rows: a question is right when all its rotations are; a single pass is its first."""
    keys = [int(question.question_id) % COPY_STEP for question in questions]
    passes = grouped(keys, is_right)
    category = {key: question.category for key, question in reversed(list(zip(keys, questions, strict=True)))}
    circular = [float(all(each)) for each in passes.values()]
    first = [float(each[0]) for each in passes.values()]
    name = "accuracy" if all(len(each) == 1 for each in passes.values()) else "circular accuracy"
    extra = () if name == "accuracy" else (mean_metric("accuracy of the first pass", first),)
    rows = mean_rows(grouped((category[key] for key in passes), circular), name)
    return {"metrics": (mean_metric(name, circular), *extra), "rows": rows}
