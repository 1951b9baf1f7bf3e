"""How the VQA challenge compares short answers: EvalAI's normalisation, and agreement with ten people.

Written to give the same texts as the processor in LLaVA's m4c_evaluator.py (it comes from facebookresearch/mmf, BSD),
whose slips are part of all published numbers and are kept:

- periods are removed up to the 32nd, for a flag stands where the count belongs;
- a period is removed behind a digit too, unless a digit follows;
- a punctuation mark becomes a space, or nothing where the text has that mark beside a space: `a/b` becomes `a b`, of
  which the article is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llava_saep.errors import UserError

from ._files import required

NUM_HUMAN_ANSWERS = 10

_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = ("a", "an", "the")
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number) for number, word in enumerate("one two three four five six seven eight nine ten".split(), 1)
}

# A spelling and what it becomes. The original's spellings with capitals are left out: the text is lower case by then.
_CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've
    hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd
    howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am
    mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't
    mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
    'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll
    someones:someone's somethingd:something'd somethingd've:something'd've something'dve:something'd've
    somethingll:something'll thats:that's thered:there'd thered've:there'd've there'dve:there'd've
    therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll
    theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've
    werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd
    wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll
    yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
    """.split()
)


@lru_cache(maxsize=1 << 16)  # people's answers are the same few words millions of times
def normalize_vqa_answer(text: str) -> str:
    """The form in which the VQA challenge compares an answer: `"Two dogs."` -> `"2 dogs"`."""
    text = lower_words(text).replace("\n", " ").replace("\t", " ").strip()
    return normalize_words(remove_punctuation(text))


def lower_words(text: str) -> str:
    """Lower case, without commas and question marks, `'s` as a word of its own."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def remove_punctuation(text: str) -> str:
    """Take marks out of a text, or put spaces in their place (see the module's head)."""
    has_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or has_number_with_comma else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalize_words(text: str) -> str:
    """Lower-case words: number words as digits, no articles, contractions with their apostrophes."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def human_agreement(said: Sequence[str]) -> dict[str, float]:
    """Score of each answer that a person gave, after normalisation: how many of the nine others said it, in thirds.

    Returns:
        normalised answer -> score in [0, 1], averaged over leaving each person out.
    """
    answers = [normalize_vqa_answer(answer) for answer in said]
    scores = {}
    for answer in dict.fromkeys(answers):
        others = (answers.count(answer) - (left_out == answer) for left_out in answers)
        scores[answer] = sum(min(1, count / 3) for count in others) / len(answers)
    return scores


def human_answers(annotation: Mapping[str, Any], place: str) -> list[str]:
    """The answers of an annotation: texts (TextVQA), or objects with an `answer` (VQAv2, VizWiz).

    Raises:
        UserError: they are absent or something else; begins with `place`.
    """
    answers = required(annotation, "answers", place, list)
    return [each if isinstance(each, str) else required(each, "answer", place, str) for each in answers]


def vqa_score(generated: str, truths: Sequence[str], place: str) -> float:
    """Soft accuracy, in [0, 1], of a generated answer.

    Raises:
        UserError: not ten human answers; `place` says whose.
    """
    if len(truths) != NUM_HUMAN_ANSWERS:
        raise UserError(f"{place}: has {len(truths)} answers of people; the score is defined for {NUM_HUMAN_ANSWERS}")
    return human_agreement(truths).get(normalize_vqa_answer(generated), 0.0)
