"""Small tasks with one right answer, drawn from the word lists: each kind is a function of a random source.

The same kinds are asked in the text that the packaged model is trained on (as plain questions) and in the
sample rows (as instructions); the rows use a prompt form that the model has not met, so that fine-tuning
has something to teach: to answer in that form, shortly, and to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.sample_rows import words
from tests.sample_rows.words import capitalised, number_word, with_article


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: `instruction`, an `input` it is about (or none), and the right `output`."""

    instruction: str
    input: str = ""
    output: str


def _either_way(rng: Random, question: str, command: str, subject: str, answer: str) -> Task:
    """Ask in a question that names the subject, or by a command whose subject stands in the input."""
    if rng.random() < 0.5:
        return Task(instruction=question, output=answer)
    return Task(instruction=command, input=subject, output=answer)


def opposite(rng: Random) -> Task:
    word, other = rng.choice(words.OPPOSITES)
    if rng.random() < 0.5:
        word, other = other, word
    answer = f"The opposite of {word} is {other}."
    return _either_way(
        rng, f"What is the opposite of {word}?", "Give the opposite of the word.", word, answer
    )


def plural(rng: Random) -> Task:
    one, many = rng.choice(words.PLURALS)
    answer = f"The plural of {one} is {many}."
    return _either_way(rng, f"What is the plural of {one}?", "Write the plural of the word.", one, answer)


def past(rng: Random) -> Task:
    verb, before = rng.choice(words.PAST)
    answer = f"The past tense of {verb} is {before}."
    return _either_way(
        rng, f"What is the past tense of {verb}?", "Write the verb in the past tense.", verb, answer
    )


def colour(rng: Random) -> Task:
    thing, name = rng.choice(words.COLOURS_OF)
    return Task(instruction=f"What colour is {thing}?", output=f"{capitalised(thing)} is {name}.")


def capital(rng: Random) -> Task:
    country, city = rng.choice(words.CAPITALS)
    answer = f"The capital of {country} is {city}."
    return _either_way(
        rng,
        f"What is the capital of {country}?",
        "Name the capital of the country.",
        capitalised(country),
        answer,
    )


def animal(rng: Random) -> Task:
    name, kind, legs, sound, young, home = rng.choice(words.ANIMALS)
    one = with_article(name)
    return rng.choice(
        [
            Task(
                instruction=f"How many legs does {one} have?", output=f"{capitalised(one)} has {legs} legs."
            ),
            Task(instruction=f"What sound does {one} make?", output=f"{capitalised(one)} {sound}."),
            Task(
                instruction=f"What is a young {name} called?",
                output=f"A young {name} is called {with_article(young)}.",
            ),
            Task(instruction=f"Where does {one} live?", output=f"{capitalised(one)} lives {home}."),
            Task(
                instruction=f"What kind of animal is {one}?",
                output=f"{capitalised(one)} is {with_article(kind)}.",
            ),
        ]
    )


def member(rng: Random) -> Task:
    group = rng.choice(sorted(words.MEMBERS))
    inside = rng.choice(words.MEMBERS[group])
    subject = inside if inside[0].isupper() or group in _MASS or inside == "spinach" else with_article(inside)
    if rng.random() < 0.5:
        return Task(
            instruction=f"Is {subject} {with_article(group)}?",
            output=f"Yes, {subject} is {with_article(group)}.",
        )
    other = rng.choice(
        [name for name in sorted(words.MEMBERS) if name != group and inside not in words.MEMBERS[name]]
    )
    if {group, other} == {"animal", "bird"}:
        return Task(
            instruction=f"What is {subject}?", output=f"{capitalised(subject)} is {with_article(group)}."
        )
    return Task(
        instruction=f"Is {subject} {with_article(other)}?",
        output=f"No, {subject} is {with_article(group)}, not {with_article(other)}.",
    )


_MASS = {"drink", "colour", "sport", "season", "metal"}


def use(rng: Random) -> Task:
    thing, purpose = rng.choice(words.USES)
    plural_verb = "are" if thing == "scissors" else "is"
    return Task(
        instruction=f"What {plural_verb} {thing} used for?",
        output=f"{capitalised(thing)} {plural_verb} used {purpose}.",
    )


def total(rng: Random) -> Task:
    most = 10 if rng.random() < 0.7 else 50
    a, b = rng.randint(0, most), rng.randint(0, most)
    if rng.random() < 0.5:
        return Task(instruction=f"What is {a} plus {b}?", output=f"{a} plus {b} is {a + b}.")
    return Task(instruction="Add the two numbers.", input=f"{a} and {b}", output=f"{a} plus {b} is {a + b}.")


def difference(rng: Random) -> Task:
    most = 10 if rng.random() < 0.7 else 30
    b, rest = rng.randint(0, most), rng.randint(0, most)
    a = b + rest
    return Task(instruction=f"What is {a} minus {b}?", output=f"{a} minus {b} is {rest}.")


def larger(rng: Random) -> Task:
    a, b = rng.sample(range(100), 2)
    word, right = rng.choice([("larger", max(a, b)), ("smaller", min(a, b))])
    other = a + b - right
    return Task(instruction=f"Which number is {word}, {a} or {b}?", output=f"{right} is {word} than {other}.")


def next_number(rng: Random) -> Task:
    number = rng.randint(1, 99)
    side, answer = rng.choice([("after", number + 1), ("before", number - 1)])
    return Task(instruction=f"Which number comes {side} {number}?", output=f"{answer} comes {side} {number}.")


def count(rng: Random) -> Task:
    start = rng.randint(0, 20)
    end = start + rng.randint(2, 6)
    return Task(
        instruction=f"Count from {start} to {end}.", output=", ".join(map(str, range(start, end + 1))) + "."
    )


def number_name(rng: Random) -> Task:
    number = rng.randint(0, 100)
    answer = f"{number} is written {number_word(number)}."
    return _either_way(
        rng, f"How is {number} written in words?", "Write the number in words.", str(number), answer
    )


def neighbour(rng: Random) -> Task:
    names, what = rng.choice([(words.DAYS, "day"), (words.MONTHS, "month")])
    at = rng.randrange(len(names))
    side, step = rng.choice([("after", 1), ("before", -1)])
    answer = names[(at + step) % len(names)]
    return Task(
        instruction=f"Which {what} comes {side} {names[at]}?", output=f"{answer} comes {side} {names[at]}."
    )


_SPELLABLE = words.spellable()


def letters(rng: Random) -> Task:
    word = rng.choice(_SPELLABLE)
    which = rng.randrange(3)
    if which == 0:
        answer = f"The word {word} starts with {word[0]}."
        return _either_way(
            rng, f"Which letter does {word} start with?", "Give the first letter of the word.", word, answer
        )
    if which == 1:
        return Task(
            instruction=f"Which letter does {word} end with?", output=f"The word {word} ends with {word[-1]}."
        )
    answer = f"{capitalised(word)} is spelled {'-'.join(word)}."
    return _either_way(rng, f"How do you spell {word}?", "Spell the word.", word, answer)


def repeat(rng: Random) -> Task:
    word = rng.choice(_SPELLABLE)
    times, how = rng.choice([(2, "twice"), (3, "three times"), (4, "four times")])
    return _either_way(
        rng,
        f"Say {word} {how}.",
        f"Repeat the word {how}.",
        word,
        capitalised(" ".join([word] * times)) + ".",
    )


def listing(rng: Random) -> Task:
    group = rng.choice(
        ["fruit", "vegetable", "animal", "bird", "colour", "tool", "vehicle", "drink", "sport"]
    )
    size = rng.choice([2, 3])
    many = group if group == "fruit" else group + "s"
    *start, end = rng.sample(words.MEMBERS[group], size)
    return Task(
        instruction=f"Name {number_word(size)} {many}.", output=f"{capitalised(', '.join(start))} and {end}."
    )


def greeting(rng: Random) -> Task:
    name = rng.choice(words.NAMES)
    hello, reply = rng.choice(
        [
            ("Greet", f"Hello, {name}!"),
            ("Say goodbye to", f"Goodbye, {name}!"),
            ("Thank", f"Thank you, {name}!"),
        ]
    )
    return Task(instruction=f"{hello} {name}.", output=reply)


def sentence(rng: Random) -> Task:
    name, thing, place = rng.choice(words.NAMES), rng.choice(words.THINGS), rng.choice(words.PLACES)
    return Task(
        instruction="Write a sentence with these words.",
        input=f"{name}, {thing}, {place}",
        output=f"{name} found {with_article(thing)} in the {place}.",
    )


KINDS: dict[str, Callable[[Random], Task]] = {
    "opposite": opposite,
    "plural": plural,
    "past": past,
    "colour": colour,
    "capital": capital,
    "animal": animal,
    "member": member,
    "use": use,
    "total": total,
    "difference": difference,
    "larger": larger,
    "next_number": next_number,
    "count": count,
    "number_name": number_name,
    "neighbour": neighbour,
    "letters": letters,
    "repeat": repeat,
    "listing": listing,
    "greeting": greeting,
    "sentence": sentence,
}
