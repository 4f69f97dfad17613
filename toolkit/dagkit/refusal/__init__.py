"""Prompts that are never generated: those that sexualise minors. There is no switch.

The check reads a prompt the way a person would, not byte by byte: case, accents, look-alike letters of other
scripts, digits for letters, invisible characters, spaced-out or punctuated letters, doubled letters, starred-out
letters and small misspellings make no difference. It refuses when a prompt, or the concept that it serves, is sexual
and the prompt speaks of somebody who is or may be a minor, ages in figures and in words included.

What reads as guilty is read once more without the phrases in which such words mean something else: "a minor road",
"chicken breast", "a 16 year old cat" (`dagkit.refusal.words` holds all words and phrases). Where in doubt it refuses,
and it says which word it read as what.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import takewhile
from typing import Final, NamedTuple

from dagkit.errors import PromptRefused
from dagkit.refusal import words

# Spellings too short or too common to be looked for with letters changed.
_FUZZY_LENGTH: Final = 6
_LONGEST_QUOTE: Final = 40
_LONGEST_TERM: Final = 20

_LOOK_ALIKES: Final = str.maketrans(
    {
        **dict(zip("авекмнорстухіјѕԁɡӏոһԛԝ", "abekmhopctyxijsdglnhqw", strict=True)),
        **dict(zip("αβεηικνορτυχω", "abenikvoptuxw", strict=True)),
        **dict(zip("ıłøđßæœðþɑƒ", "ilodsaodpaf", strict=True)),
        **dict(zip("ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "abcdefghijklmnoprstuvwyz", strict=True)),
        # Letters in a black circle, in a black square, and those of flags.
        **{chr(first + n): chr(ord("a") + n) for first in (0x1F150, 0x1F170, 0x1F1E6) for n in range(26)},
    }
)
# Signs for letters; 1, ! and | stand for i or for l.
_LEET: Final = [str.maketrans("03456789@$€£(+1!|", "oeasgtbgaselct" + 3 * one) for one in "il"]
_FILLERS: Final = re.compile("[\u02b0-\u02ff\u115f\u1160]")
_TOKEN: Final = re.compile(r"[^\W_]+(?:['’*]+[^\W_]*)*")
# Signs that stand for no letter: brackets and those behind a word. Of short words both is tried.
_CLOSING: Final = re.compile(r"(?<=[^\W_])[!|(+]+(?![\w@$€£])|\((?=[^)]*\))")
_CLOSING_LONG: Final = re.compile(r"(?<=[^\W_]{5})[!|(+]+(?![\w@$€£])|\((?=[^)]*\))")
_CYRILLIC: Final = re.compile(r"[а-яё]{2,}")

_ONES: Final = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
_TENS: Final = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES: Final = {
    **{word: value for value, word in enumerate(_ONES)},
    **{word: 10 * value for value, word in enumerate(_TENS, start=2)},
    "hundred": 100,
}
_HUNDRED: Final = r"(?:hundred[\s\-]+(?:and[\s\-]+)?)?"
_A_ONE: Final = "|".join(sorted(_ONES, key=len, reverse=True))
_A_TEN: Final = "|".join(_TENS)
_WORD_NUMBER: Final = (
    # The six of "sixty" is no number, that of "sixyearold" is.
    rf"{_HUNDRED}(?:(?:{_A_TEN})[\s\-]*)?(?:{_A_ONE})(?!t?een|t?y(?![eor]))|{_HUNDRED}(?:{_A_TEN})|hundred"
)
_NUMBER: Final = rf"(?:(?<!\d)(?<!\d[.,])\d{{1,3}}|(?<![^\W\d_])(?:{_WORD_NUMBER}))"
_NUMBERS: Final = rf"{_NUMBER}(?:\s*(?:-|–|to|or|and)\s*{_NUMBER})?"
_NO_FRACTION: Final = r"(?![^\W_])(?![.,]\d|:\d\d)"
_GAP: Final = r"(?:[^\w,;]|_){0,6}"
_AGE: Final = re.compile(
    # "15 year old", "fifteen-years-of-age", "15yo", "15 y/o", "15 y.o.", "12 to 20 years old", "6 months old"
    rf"(?P<old>{_NUMBERS}){_GAP}"
    rf"(?:(?:years?|yrs?|y|y[o0]|yr|months?|weeks?|days?){_GAP}(?:[o0]ld|of{_GAP}age|o(?![^\W_])|young)"
    r"|y[o0](?![^\W_])|yrs?(?![^\W_])|year(?=\s+(?:boy|girl|female|male)s?\b)"
    # "a model, 15 years", but not "for 15 years"
    r"|years?(?=\s*(?:[^\w\s'’\-]|$)))"
    # "aged 15", "age of 15", "she's 15", "looks 15"
    r"|(?<![^\W_])(?:aged?|ages|age\s+of|turning|turned|barely|looks?|looking|(?:she|he|who)['’]?s|i['’]?m)"
    rf"(?:{_GAP}|[=:\s]*)(?P<aged>{_NUMBERS}){_NO_FRACTION}"
    # "who is 15", "only 15"
    rf"|(?<![^\W_])(?:is|was|just|only)[\s:=\-_]*(?P<maybe>{_NUMBER}){_NO_FRACTION}"
    r"(?!\s*(?:people|person|women|men|adults|of\b(?!\s+age)|min|%|px|k\b))"
    rf"|(?P<hers>{_NUMBER})\s+is\s+(?:her|his|their)\s+age"
    # "under 18"
    rf"|(?:under|below|younger\s+than|less\s+than|not\s+yet|not\s+even){_GAP}(?P<under>{_NUMBER}){_NO_FRACTION}"
    r"|(?P<grade>(?<![^\W_])\d{1,2}(?:st|nd|rd|th)[\s\-_]*graders?(?![^\W_]))"
)
# Signs that do not hold the pieces of a word together.
_LOOSE: Final = re.compile(r"[\s'’/&\-–—]")
# "n u d e", "n.u.d.e"
_SPELT_OUT: Final = re.compile(r"(?<![^\W_])[^\W_]([\W_])[^\W_](?:\1[^\W_])*(?![^\W_])")
# Words with a figure in them, but not "15yo", "2nd", "35mm".
_MIXED: Final = re.compile(r"(?<![^\W_])(?!\d+[^\W\d_]*(?![^\W_]))(?=[^\W_]*\d)[^\W_]+")
_ADULT: Final = re.compile(
    r"(?<![^\W_])(?:adults|adult\s+(?:couple|figure|m[ae]n|model|nude|people|person|wom[ae]n|[a-z]+(?:er|ist|or))s?)(?![^\W_])"
)
_GROWN: Final = re.compile(r"adults?|couples?|m[ae]n|wom[ae]n")
_LASTING: Final = re.compile(r"\b(?:after|for|in|last|lasted|married|next|over|past|took|within)\s+$")


def refuse_sexualised_minors(prompt: str, context: Iterable[str] = ()) -> None:
    """Refuses a prompt that sexualises minors. Called before every image is drawn; it cannot be switched off.

    Args:
        prompt: the text to draw, or a negative prompt.
        context: further texts that say what the image is for, such as a concept's summary and safety prompt: a
            prompt of a child in a set made for a sexual concept is refused, too.

    Raises:
        PromptRefused: with a message that says which words were read as what, but does not repeat the prompt.
    """
    context = list(context)
    plain = _plain(prompt)
    found = _guilty(plain, context)
    if found:
        found = _guilty(_without_innocent(plain), context)
    if found:
        raise PromptRefused(_explanation(prompt, *found))


class _Reading(NamedTuple):
    """What a piece of a prompt was read as."""

    written: str
    term: str


def _guilty(text: str, context: Sequence[str]) -> tuple[_Reading, _Reading] | None:
    """Who may be a minor, and what is sexual, or None where either is missing."""
    minor = _minor(text)
    if not minor:
        return None
    sexual = _find(text, "sexual")
    around = next((reading for one in context if (reading := _sexual_context(one))), None)
    if sexual and not around and not _find(text, "sexual but dress"):
        minor = _minor(_phrase(words.YOUNG_ADULT).sub(" , ", text))
    sexual = sexual or around
    return (minor, sexual) if minor and sexual else None


def _explanation(prompt: str, minor: _Reading, sexual: _Reading) -> str:
    def message(who: str, what: str) -> str:
        return (
            f"this prompt is refused: it speaks of somebody who is or may be a minor{who} in a sexual context{what}. "
            "dagkit never generates that, and this check cannot be switched off. Where adults are meant, write "
            "'adult man' or 'adult woman'."
        )

    quoted = message(*(f" ({_quote(reading)})" for reading in (minor, sexual)))
    return message("", "") if _plain(prompt).strip() in _plain(quoted) or prompt in quoted else quoted


def _quote(reading: _Reading) -> str:
    written = reading.written if len(reading.written) <= _LONGEST_QUOTE else f"{reading.written[:_LONGEST_QUOTE]}..."
    return f"'{written}'" if written == reading.term else f"'{written}', read as {reading.term}"


def _minor(text: str) -> _Reading | None:
    return _find(text, "minor") or _young_age(text)


@lru_cache(maxsize=1024)
def _sexual_context(text: str) -> _Reading | None:
    reading = _find(_without_innocent(_plain(text)), "sexual")
    return reading and _Reading(reading.written, f"{reading.term} in the concept's texts")


@dataclass(frozen=True, eq=False)
class _Terms:
    """A word list, with what is needed to find its words in other spellings."""

    listed: dict[str, str]
    """Spelt in one -> as it is shown."""
    compounds: frozenset[str]
    """Those of several words, spelt in one."""
    squeezed: dict[str, str]
    """Without doubled letters -> spelt in one."""
    near: dict[str, tuple[str, ...]]
    """Whole or without any one letter -> spelt in one."""
    runs: tuple[str, ...]
    """Terms of scripts that have no spaces."""


@cache
def _terms(kind: str) -> _Terms:
    dress = set(_listing(words.LIGHT_DRESS))
    listing = {
        "minor": _listing(words.MINORS),
        "sexual": _listing(words.SEXUAL),
        "sexual but dress": [term for term in _listing(words.SEXUAL) if term not in dress],
    }[kind]
    listed = {_spelt_in_one(term): _plain(term.replace("-", "").replace("_", " ")) for term in listing}
    near: dict[str, tuple[str, ...]] = {}
    for term in listed:
        for key in _shortened(term):
            near[key] = (*near.get(key, ()), term)
    return _Terms(
        listed,
        frozenset(_spelt_in_one(term) for term in listing if "-" in term or "_" in term),
        {_squeeze(term): term for term in reversed(listed)},
        near,
        tuple(term for term in listed if not term.isascii() and not _CYRILLIC.fullmatch(term)),
    )


def _listing(text: str) -> list[str]:
    return [term for line in text.splitlines() if not line.startswith("#") for term in line.split()]


def _spelt_in_one(term: str) -> str:
    return _plain(term.replace("-", "").replace("_", ""))


_ORDINARY: Final = frozenset(_listing(words.ORDINARY))
_OF_SOMEBODY: Final = frozenset(_listing(words.OF_SOMEBODY + words.SOMEBODY))
_FUNCTION_WORDS: Final = frozenset(words.FUNCTION_WORDS.split())
_AMBIGUOUS: Final = re.compile(rf"(?<![^\W_])(?:{'|'.join(words.AMBIGUOUS.split())})(?![^\W_])")
# What stands between words of one clause, and the word before and behind a place.
_BESIDE: Final = r"(?:[^\w,.;:!?()]|_)+"
_BEFORE: Final = re.compile(rf"([^\W_]+){_BESIDE}$")
_BEHIND: Final = re.compile(rf"{_BESIDE}([^\W_]+)")
_BEFORE_THINGS: Final = frozenset((words.BEFORE_THINGS + words.COLOURS + words.DESCRIBING).split())


def _plain(text: str) -> str:
    """Lower case, without accents and invisible characters, full-width and styled letters as plain ones."""
    if text.isascii():
        return text.casefold()
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(
        character
        for character in text
        if unicodedata.category(character) not in ("Mn", "Cf", "Cc", "Me") or character in "\n\t"
    )
    return _FILLERS.sub("", text)


class _Text(NamedTuple):
    """A reading of a plain text."""

    text: str
    figures: str
    """The same, letter for letter, with its figures as they are."""


def _readings(plain: str) -> Iterator[_Text]:
    """The text as it stands, with look-alikes as Latin letters, spelt-out words in one, and signs as letters."""
    latin = plain.translate(_LOOK_ALIKES)
    spelt = _SPELT_OUT.sub(lambda match: match[0].replace(match[1], ""), latin)
    for text in dict.fromkeys((plain, latin, spelt)):
        yield _Text(text, text)
    closed = {pattern.sub(lambda match: " " * len(match[0]), latin) for pattern in (_CLOSING, _CLOSING_LONG)}
    for text in sorted({text.translate(table) for text in closed for table in _LEET} - {plain, latin, *closed}):
        yield _Text(text, latin)


def _find(plain: str, kind: str) -> _Reading | None:
    """The first word of a list, in whatever spelling."""
    terms = _terms(kind)
    for reading in _readings(plain):
        tokens = list(_tokens(reading))
        for token in tokens:
            found = _match(token.text, kind) if not token.is_number else None
            if found:
                return found._replace(written=token.written) if found.written == token.text else found
        for found in _joined(tokens, terms):
            return found
    return next((_Reading(term, term) for term in terms.runs if term in plain), None)


class _Token(NamedTuple):
    text: str
    written: str
    word: str
    gap: str
    """What stands between it and the token before it."""
    is_number: bool
    is_ordinary: bool


def _tokens(reading: _Text) -> Iterator[_Token]:
    end = 0
    for match in _TOKEN.finditer(reading.text):
        raw = match[0].replace("’", "'")
        figures = reading.figures[match.start() : match.end()]
        is_number = figures.isdecimal()
        word = raw.replace("'", "")
        yield _Token(
            raw,
            figures,
            word,
            reading.text[end : match.start()],
            # Five digits and more are no number that anybody paints: 80085.
            is_number and len(word) < 5,
            is_number or raw in _ORDINARY,
        )
        end = match.end()


@lru_cache(maxsize=20_000)
def _match(token: str, kind: str) -> _Reading | None:
    """One word: as listed, in the plural, with letters doubled, starred out or wrong, or glued to another word."""
    terms = _terms(kind)
    if token.removesuffix("'s") in _ORDINARY:
        return None
    word = token.replace("'", "")
    parts = [word, word.replace("*", ""), *re.split(r"['\d]+", token)]
    for part in parts:
        for found in (part, part.removesuffix("s"), part.removesuffix("es")):
            if (
                found in terms.listed
                and (len(found) > 2 or found == part)
                and (found + "es" != part or found[-1] == "s")
            ):
                return _Reading(part, terms.listed[found])
    term = _respelt(word, terms) or _starred(word, terms)
    if term:
        return _Reading(token, terms.listed[term])
    term = _glued(word, terms)
    return _Reading(term, terms.listed[term]) if term else None


def _respelt(word: str, terms: _Terms) -> str | None:
    """With letters doubled, or with one letter or two neighbours wrong."""
    if word in _ORDINARY:
        return None
    squeezed = _squeeze(word)
    if squeezed in terms.squeezed and (word != squeezed or len(squeezed) >= _FUZZY_LENGTH):
        return terms.squeezed[squeezed]
    if len(word) < _FUZZY_LENGTH - 1:
        return None
    candidates = (term for key in _shortened(word) for term in terms.near.get(key, ()))
    return next(
        (
            term
            for term in candidates
            if (len(term) >= _FUZZY_LENGTH or _is_swapped(word, term)) and _is_near(word, term)
        ),
        None,
    )


def _starred(word: str, terms: _Terms) -> str | None:
    if "*" not in word or not 3 <= len(word) <= _LONGEST_QUOTE or not word.strip("*"):
        return None
    pattern = re.compile(re.sub(r"\*+", ".{1,3}", word))
    return next((term for term in terms.listed if term.isascii() and pattern.fullmatch(term)), None)


def _glued(word: str, terms: _Terms) -> str | None:
    """A term that is one half of a word of which the other half is a term, too, or that stands beside one inside it."""
    known = (_terms("minor").listed, _terms("sexual").listed)
    if len(word) < 6 or word in _ORDINARY:
        return None
    for cut in range(3, min(len(word) - 2, _LONGEST_TERM + 1)):
        halves = word[:cut], word[cut:]
        if all(any(half in listed for listed in known) for half in halves):
            return next((half for half in halves if half in terms.listed), None)
    minors, sexual = (
        [
            (start, end)
            for start in range(len(word))
            for end in range(start + shortest, min(len(word), start + _LONGEST_TERM) + 1)
            if word[start:end] in listed
        ]
        for listed, shortest in zip(known, (3, 4), strict=True)
    )
    apart = ((who, what) for who in minors for what in sexual if who[1] <= what[0] or what[1] <= who[0])
    found = (word[start:end] for pair in apart for start, end in pair if word[start:end] in terms.listed)
    return next(found, None)


def _joined(tokens: Sequence[_Token], terms: _Terms) -> Iterator[_Reading]:
    """Words that were cut by punctuation or spaces, or spelt letter by letter, the longest first.

    Ordinary words make no other word with their neighbours ("the pen is"), unless signs alone hold them together
    ("pen.is") or the term is one of several words.
    """
    for start in range(len(tokens)):
        found = []
        word = ""
        is_ordinary, is_short, is_held = True, True, True
        for end in range(start, len(tokens)):
            token = tokens[end]
            word += token.word
            is_ordinary &= token.is_ordinary
            is_short &= len(token.word) <= 2
            is_held &= end == start or (bool(token.gap) and not _LOOSE.search(token.gap))
            if (token.is_number and len(token.word) > 1) or len(word) > _LONGEST_TERM:
                break
            if end - start >= 3 and not is_short and not is_held:
                break
            term = next((one for one in (word, word.removesuffix("s")) if one in terms.listed), None)
            if is_short and not is_ordinary and not term:
                term = terms.squeezed.get(_squeeze(word))
            if end > start and term and (not is_ordinary or is_held or term in terms.compounds):
                written = " ".join(one.written for one in tokens[start : end + 1])
                found.append(_Reading(written, terms.listed[term]))
        yield from reversed(found)
    yield from _shifted(tokens, terms)


def _shifted(tokens: Sequence[_Token], terms: _Terms) -> Iterator[_Reading]:
    """Words of five letters and more that begin or end within a piece: "an ud ec hi ld"."""
    run: list[_Token] = []
    for token in [*tokens, None]:
        if token and len(token.word) <= 2:
            run.append(token)
            continue
        letters = "".join(one.word for one in run)
        owners = [one for one in run for _ in one.word]
        for start in range(len(letters)):
            for end in range(start + 5, min(len(letters), start + 16) + 1):
                word = letters[start:end]
                if word in terms.listed and not all(one.is_ordinary for one in owners[start:end]):
                    yield _Reading(word, terms.listed[word])
        run = []


def _squeeze(word: str) -> str:
    return re.sub(r"(.)\1+", r"\1", word)


def _shortened(word: str) -> set[str]:
    """A word and all that it becomes when one letter is left out."""
    if not _FUZZY_LENGTH - 1 <= len(word) <= _LONGEST_QUOTE:
        return set()
    return {word} | {word[:index] + word[index + 1 :] for index in range(len(word))}


def _is_swapped(word: str, term: str) -> bool:
    """The same letters, of which two neighbours changed places, with the first in its place."""
    return len(word) == len(term) >= 5 and word[0] == term[0] and sorted(word) == sorted(term)


def _is_near(word: str, term: str) -> bool:
    """One letter left out, added, changed, or two neighbours swapped, behind the same first letter."""
    if len(word) < _FUZZY_LENGTH - 1 or word[0] != term[0] or abs(len(word) - len(term)) > 1:
        return False
    start = 0
    while start < min(len(word), len(term)) and word[start] == term[start]:
        start += 1
    a, b = word[start:], term[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (len(a) > 1 and a[:2] == b[1::-1] and a[2:] == b[2:])


def _young_age(plain: str) -> _Reading | None:
    """The first age, in figures or words, of somebody who is or may be a minor."""
    texts = [reading.text for reading in _readings(plain) if reading.text == reading.figures]
    mixed = _MIXED.sub(lambda match: match[0].translate(_LEET[0]), texts[-1])
    readings = (_young(match) for text in dict.fromkeys((*texts, mixed)) for match in _AGE.finditer(text))
    return next((reading for reading in readings if reading), None)


def _young(match: re.Match[str]) -> _Reading | None:
    if match["grade"]:
        return _Reading(match[0], "a pupil")
    if (
        match["old"]
        and match[0].endswith(("year", "years", "yr", "yrs"))
        and _LASTING.search(match.string[: match.start()])
    ):
        return None
    numbers = match["old"] or match["aged"] or match["maybe"] or match["hers"] or match["under"]
    age = min(_value(number[0]) for number in re.finditer(_NUMBER, numbers))
    is_young = age < 18 or (match["under"] and age <= 21) or re.search("month|week|day", match[0])
    return _Reading(match[0], "an age under 18") if is_young else None


def _value(number: str) -> int:
    if number.isdecimal():
        return int(number)
    return sum(_VALUES[word] for word in re.findall("|".join(sorted(_VALUES, key=len, reverse=True)), number))


@cache
def _phrase(pattern: str) -> re.Pattern[str]:
    """Phrases, one a line, as a regular expression for plain text."""

    def nouns(listing: str) -> str:
        return f"(?:{'|'.join(noun.replace('_', ' ') for noun in listing.split())})(?:s|es)?"

    def some(listing: str, most: int) -> str:
        return f"(?:(?:{'|'.join(listing.split())}) ){{0,{most}}}"

    groups = {
        **{name: nouns(listing) for name, listing in words.NOUNS.items()},
        **words.PIECES,
        "unit": f"(?:{'|'.join(words.UNITS.split())})",
        "counted": f"(?:{'|'.join(words.COUNTED.split())})",
        "adj": some(words.COLOURS + words.DESCRIBING, 2),
        "colour": some(words.COLOURS, 2),
        "alone": rf"(?!{_BESIDE}(?!(?:{'|'.join((words.ALONE + words.FUNCTION_WORDS).split())})(?![^\W_]))[^\W_])",
    }
    lines = [
        line.replace(" ~ ", f" {some(words.LINKING + words.COLOURS + words.DESCRIBING, 3)}") for line in _lines(pattern)
    ]
    lines = [re.sub(r"\{([a-z ]+)\}", lambda match: groups[match[1]], line) for line in lines]
    somebody = "|".join(words.SOMEBODY.split())
    whole = rf"(?<![^\W_])(?:{'|'.join(lines)})(?![^\W_])"
    apart = whole.replace(" ?", r"[\s\-]*").replace(" ", r"[\s\-]+")
    return re.compile(rf"{apart}(?!{_BESIDE}(?:{somebody})s?(?![^\W_]))")


def _lines(text: str) -> list[str]:
    """Phrases; a line that begins with blanks goes on with the one before it."""
    joined = re.sub(r"\n {4,}", "", text)
    return [line for line in joined.splitlines() if line and not line.startswith("#")]


def _without_innocent(text: str) -> str:
    """A plain text without the phrases in which words of the lists mean something else."""
    text = re.sub(r"[\s\-_]{3,}", "  ", text)
    for run in words.INNOCENT_RUNS.split():
        text = text.replace(_plain(run), " , ")
    text = _phrase(words.INNOCENT).sub(_taken_out, text)
    if _ADULT.search(text):
        text = _phrase(words.INNOCENT_BESIDE_ADULTS).sub(_taken_out, text)
    return _AMBIGUOUS.sub(lambda match: " , " if _is_of_thing(match) else match[0], text)


def _is_of_thing(match: re.Match[str]) -> bool:
    """Whether a word that speaks of things as often as of people describes a thing here."""
    before = _BEFORE.search(match.string[: match.start()][-_LONGEST_QUOTE:])
    if before and not _may_stand_before_things(before[1]):
        return False
    after = re.match(r"(?:[\s\-]+[^\s\-,.;:!?]+){0,6}", match.string[match.end() :][:200])
    if not after or not after[0].isascii():
        return False
    following = re.findall(r"[^\W_]+", after[0])
    if not following or following[0] in _FUNCTION_WORDS:
        return False
    # As far as "an exposed roof of the old school", or of whom.
    said = list(takewhile(lambda word: word not in _FUNCTION_WORDS or word in ("of", "a", "an", "the"), following))
    return not any(_is_of_somebody(word) for word in (*said, " ".join(said)))


@lru_cache(maxsize=5_000)
def _is_of_somebody(word: str) -> bool:
    singular = word.removesuffix("s")
    return bool({word, singular} & _OF_SOMEBODY) or any(_find(word, kind) for kind in ("minor", "sexual"))


def _taken_out(match: re.Match[str]) -> str:
    """A break in place of an innocent phrase; the phrase itself where the words beside it say otherwise."""
    before = _BEFORE.search(match.string[: match.start()][-_LONGEST_QUOTE:])
    behind = _BEHIND.match(match.string[match.end() :][:_LONGEST_QUOTE])
    minors, sexual = _terms("minor").listed, _terms("sexual").listed
    own = re.findall(r"[^\W_]+", match[0])
    # "nude young fox", but not "nude young man, 25 years old"
    is_young = any(word in minors for word in own) and not any(word.isdecimal() for word in own)
    if is_young and any(_find(one[1], "sexual") for one in (before, behind) if one):
        return match[0]
    # "girl exposed brick wall"
    is_sexual = own[0] in sexual and own[0] not in words.BEHIND_MINORS.split() and own[:2] != ["exposed", "to"]
    if is_sexual and before and _find(before[1], "minor"):
        return match[0]
    # "nude model only 9 lamps", but not "an adult model under 9 lamps"
    is_count = own[0] in ("only", "just", "under", "below", "less", "is", "are") and before is not None
    if is_count and _is_somebody_of_any_age(match.string[: match.start()]):
        return match[0]
    # "posing naked tree", "in the nude shoes"
    is_idiom = re.search(r"\bin\s+the\s+$", match.string[: match.start()][-_LONGEST_QUOTE:])
    if own[0] in words.NAKED.split() and before and (is_idiom or not _may_stand_before_things(before[1])):
        return match[0]
    return " , "


def _is_somebody_of_any_age(text: str) -> bool:
    """Whether a text ends with a person who is not said to be an adult."""
    *_, adult, somebody = ["", "", *re.findall(r"[^\W_]+", text[-_LONGEST_QUOTE:])]
    return somebody in _OF_SOMEBODY and adult != "adult" and not _GROWN.fullmatch(somebody)


def _may_stand_before_things(word: str) -> bool:
    return word in _BEFORE_THINGS or word.isdecimal()
