"""Simple English made by rule: the part of the packaged model's training text that no one wrote.

Stories, facts, questions with their answers, dialogues, counting and small sums, so that a model of a few
million parameters learns plain sentences and has something to know. Nothing here uses the prompt forms that
fine-tuning uses (`### Instruction:`, `### Human:`, `User:`): those are left to be learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tests.sample_rows import words
from tests.sample_rows.questions import KINDS, Task
from tests.sample_rows.words import capitalised, number_word, with_article


def write_documents(seed: int) -> Iterator[str]:
    """Yield documents without end; the same seed gives the same documents."""
    rng = Random(seed)
    writers = [_questions, _facts, _story, _dialogue, _numbers]
    weights = [40, 15, 25, 8, 12]
    while True:
        yield rng.choices(writers, weights)[0](rng)


def _task(rng: Random) -> Task:
    return KINDS[rng.choice(_KIND_NAMES)](rng)


_KIND_NAMES = sorted(KINDS)


def _asked(task: Task) -> str:
    """The task in one line: ``"Write the plural of the word: cat."``."""
    if not task.input:
        return task.instruction
    return f"{task.instruction.rstrip('.')}: {task.input}."


_QUESTION_FORMS = [
    "Question: {question}\nAnswer: {answer}",
    "Q: {question}\nA: {answer}",
    "Task: {question}\nResult: {answer}",
    "{question} {answer}",
    "{question}\n{answer}",
    "- {question}\n  {answer}",
    "Exercise. {question}\nSolution. {answer}",
]


def _questions(rng: Random) -> str:
    form = rng.choice(_QUESTION_FORMS)
    tasks = [_task(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 5]))]
    separator = "\n\n" if "\n" in form and rng.random() < 0.5 else "\n"
    return separator.join(form.format(question=_asked(task), answer=task.output) for task in tasks)


_PLAIN_KINDS = "opposite plural past colour capital animal use total next_number neighbour".split()


def _facts(rng: Random) -> str:
    kinds = _PLAIN_KINDS if rng.random() < 0.5 else [rng.choice(_PLAIN_KINDS)]
    return " ".join(KINDS[rng.choice(kinds)](rng).output for _ in range(rng.randint(3, 8)))


def _dialogue(rng: Random) -> str:
    first, second = rng.sample(words.NAMES, 2)
    lines = [f"{first} met {second} in the {rng.choice(words.PLACES)}. They talked for a while."]
    for _ in range(rng.randint(1, 4)):
        task = _task(rng)
        asks = rng.choice(["asked", "said"])
        lines.append(f'"{_asked(task)}" {asks} {first}.')
        lines.append(f'"{task.output}" {rng.choice(["answered", "said", "replied"])} {second}.')
        first, second = (second, first) if rng.random() < 0.4 else (first, second)
    lines.append(
        rng.choice(
            [f'"Thank you, {second}!" said {first}.', f'"Well done!" said {first}.', "Then they went home."]
        )
    )
    return "\n".join(lines)


def _numbers(rng: Random) -> str:
    what = rng.randrange(5)
    if what == 0:
        start, step = rng.randint(0, 50), rng.choice([1, 1, 1, 2, 5, 10])
        return ", ".join(str(start + step * i) for i in range(rng.randint(5, 15))) + "."
    if what == 1:
        a = rng.randint(1, 10)
        return "\n".join(f"{a} times {b} is {a * b}." for b in range(1, 11))
    if what == 2:
        start = rng.randint(0, 90)
        return "\n".join(
            f"{n} is written {number_word(n)}." for n in range(start, start + rng.randint(3, 10))
        )
    if what == 3:
        names = rng.choice([words.DAYS, words.MONTHS])
        return rng.choice([", ".join(names) + ".", "\n".join(names), " ".join(names)])
    lines = []
    for _ in range(rng.randint(3, 8)):
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        lines.append(f"{a} + {b} = {a + b}" if rng.random() < 0.6 else f"{a + b} - {b} = {a}")
    return "\n".join(lines)


def _story(rng: Random) -> str:
    """A few sentences about one child, one thing and one place, that agree with each other."""
    name, friend = rng.sample(words.NAMES, 2)
    thing, place, other_place = rng.choice(words.THINGS), *rng.sample(words.PLACES, 2)
    look, feeling = rng.choice(words.ADJECTIVES), rng.choice(words.FEELINGS)
    creature = rng.choice(words.ANIMALS)
    day = rng.choice(words.DAYS)
    a_thing, an_animal = with_article(f"{look} {thing}"), with_article(creature[0])
    opening = [
        f"One day {name} went to the {place}.",
        f"On {day} {name} walked to the {place} with {friend}.",
        f"It was {day} morning and {name} was in the {place}.",
        f"{name} lived near the {place}. Every {day} {friend} came to visit.",
        f"Once upon a time there was a child called {name} who loved the {place}.",
    ]
    middle = [
        f"There {name} found {a_thing}.",
        f"{name} saw {an_animal}. {capitalised(an_animal)} {creature[3]}, and this one was very loud.",
        f'"Look at this {thing}!" said {friend}. "It is {look}."',
        f"{name} wanted to show the {thing} to {friend}.",
        f"The {thing} was {look}, and {name} was {feeling}.",
        f"Then it started to rain, so they ran to the {other_place}.",
        f"{friend} had lost {a_thing} and was looking for it.",
        f'"Where is my {thing}?" asked {friend}. "It is in the {other_place}," said {name}.',
        f"They counted the {rng.choice(words.PLURALS)[1]} in the {place}: one, two, three.",
        f"{name} gave the {thing} to {friend}, and {friend} was {feeling}.",
        f"In the {other_place} they met {an_animal}.",
        f"{friend} felt {feeling} and sat down.",
        f"The sun was shining and the sky was {rng.choice(['blue', 'grey', 'bright', 'clear'])}.",
    ]
    ending = [
        "Then they went home.",
        f"{name} put the {thing} in a bag and went home.",
        f"In the evening {name} told the story to everyone at home.",
        f"It was a good day for {name} and {friend}.",
        f"{name} and {friend} were friends from then on.",
        f"At night {name} was tired and slept well.",
    ]
    lines = [rng.choice(opening), *rng.sample(middle, rng.randint(2, 6)), rng.choice(ending)]
    return " ".join(lines)
