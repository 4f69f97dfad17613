"""Prompts that are never generated: those that sexualise minors. There is no switch.

The check reads a prompt the way a person would, not byte by byte: case, accents, look-alike letters of other
scripts, digits for letters, invisible characters, spaced-out or punctuated letters, doubled letters, starred-out
letters and small misspellings make no difference. It refuses when a prompt, or the concept that it serves, is sexual
and the prompt speaks of somebody who is or may be a minor, ages in figures and in words included. It would rather
refuse an innocent prompt than pass a guilty one: say "adult".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache

from dagkit.errors import PromptRefused

_MINOR = """
adolescent adolescents baby babies babe_in_arms boy boys boyish child childs children childlike childish cub
daughter daughters elementary fourth_grader fifth_grader first_grader girl girls girlish highschool highschooler
highschoolers high_school infant infants jailbait juvenile juveniles kid kids kiddie kiddies kiddo kindergarten
kindergartner lad lass lassie little_one loli lolis lolicon lolita lolitas middle_school middleschooler minor minors
newborn newborns nursery_school nymphet pedo pedophile pedophilia paedophile paedophilia prepubescent preschool
preschooler preschoolers preteen preteens pre_teen pre_teens primary_school pubescent puberty pupil pupils schoolboy
schoolboys schoolchild schoolchildren schoolgirl schoolgirls school_uniform shota shotacon son sons teen teens
teenage teenaged teenager teenagers teeny tot tots toddler toddlers tween tweens underage underaged under_age
youngster youngsters youth youths young young_looking younger youthful enfant enfants fille fillette fillettes
garcon gamin gamine mineur mineure mineurs bebe ado adolescente nino nina ninos ninas menor menores muchacha
muchacho chica chico bambino bambina bambini minorenne ragazzina ragazzino kinder kindlich madchen junge jugendliche
minderjahrig minderjahrige menina menino crianca criancas ребенок ребенка дети детей девочка девочки мальчик
мальчики подросток школьница школьник несовершеннолетняя малолетка 少女 少年 幼女 幼児 子供 子ども 小学生 中学生
高校生 女子高生 未成年 ロリ ショタ
赤ちゃん 女孩 男孩 女童 男童 儿童 兒童 孩子 萝莉 正太 小女孩 幼童 소녀 소년 아이 어린이 미성년자 여고생 طفل طفلة
اطفال قاصر बच्चा बच्ची नाबालिग
"""

_SEXUAL = """
adult_film areola areolas aroused arousing anal anus ass bare_breasted bare_chested bare_skin bareback bdsm bikini
birthday_suit blowjob bondage boob boobs boobies bosom bottomless bra breast breasts brothel busty buttocks butt
camgirl clitoris cleavage cock coitus creampie cum cumshot cunnilingus cunt dick dildo disrobed doggystyle
dominatrix ecchi ejaculate ejaculation erect erection erotic erotica erotically escort explicit exhibitionist
exposed fap fellatio fetish fingering foreplay fornication fuck fucked fucking futanari gangbang genital genitals
genitalia groin handjob hardcore hentai horny intercourse intimate kinky labia lewd lingerie lust lustful
making_love masturbate masturbates masturbating masturbation milf molest molested naked nakedness nipple nipples
no_clothes no_clothing no_pants no_shirt nsfw nude nudes nudist nudity nudism onlyfans orgasm orgasming orgy panties
panty pantyless penetration penis phallus porn porno pornographic pornography prostitute provocative provocatively
pubic pussy rape raped raping r18 risque rule34 scantily seduce seducing seductive seductively semen sensual
sensually sensuous sex sexual sexualised sexualized sexuality sexually sexy shirtless skinny_dipping sexting slut
slutty softcore spank spanking sperm strip_tease striptease stripping stripper stripped suggestive swinger testicles
thong threesome tits titties topless touching_herself touching_himself unclad unclothed underwear undies undress
undressed undressing vagina vulva whore without_clothes without_clothing without_a_shirt without_a_top without_pants
wearing_nothing not_wearing_anything xxx nu nue nus nues desnuda desnudo desnudas desnudos sexe sexo sexuel sexuelle
sexuell nackt nackte nackter nacktes nuda nudo pelado pelada erotico erotica erotique голая голый голые обнаженная
обнаженный обнаженные секс порно эротика 裸 ヌード エロ セックス 全裸 半裸 下着 裸体 裸照 性交 色情 情色 赤裸 性感
벗은 누드 나체 섹스 عاري عارية جنس نंगा
नंगी
"""

# Spellings too short or too common to be looked for inside longer runs of letters or with letters changed.
_FUZZY_LENGTH = 6

_LOOK_ALIKES = str.maketrans(
    {
        **dict(zip("авекмнорстухіјѕԁɡӏոһԛԝ", "abekmhopctyxijsdglnhqw", strict=True)),
        **dict(zip("αβεηικνορτυχω", "abenikvoptuxw", strict=True)),
        **dict(zip("ıłøđßæœðþ", "ilodsaodp", strict=True)),
    }
)
_LEET = str.maketrans("013456789@$!|€£(+", "oieasgtbgasiielct")
_CYRILLIC = re.compile(r"[а-яё]{2,}")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_NUMBERS = {word: number for number, word in enumerate(_NUMBER_WORDS.split())} | {"eighteen": 18}
_NUMBER = rf"(?:\d{{1,2}}|{'|'.join(_NUMBERS)})"
_AGE = re.compile(
    # "15 year old", "fifteen-years-of-age", "15yo", "15 y/o", "6 months old"
    rf"(?<![\w.])(?P<old>{_NUMBER})[\s\-_]*"
    r"(?:(?:years?|yrs?|y|yo|yr|months?|weeks?|days?)[\s\-_]*(?:old|of[\s\-_]*age|o\b)"
    r"|yo\b|y/o\b|y\.o|yrs?\b|years?\s+young)"
    # "aged 15", "age of 15", "who is 15", "only 15"
    r"|\b(?:aged?|age\s+of|ages|turning|turned|is|just|only|looks)[\s:=\-]*"
    rf"(?P<aged>{_NUMBER})\b(?!\s*(?:people|person|women|men|adults|of|min|%|px|k\b))"
    # "under 18"
    rf"|(?:under|below|younger\s+than|less\s+than|not\s+yet)[\s\-_]*(?P<under>{_NUMBER})\b"
)


def refuse_sexualised_minors(prompt: str, context: Iterable[str] = ()) -> None:
    """Refuses a prompt that sexualises minors. Called before every image is drawn; it cannot be switched off.

    Args:
        prompt: the text to draw, or a negative prompt.
        context: further texts that say what the image is for, such as a concept's summary and safety prompt: a
            prompt of a child in a set made for a sexual concept is refused, too.

    Raises:
        PromptRefused: with a message that does not repeat the prompt.
    """
    if _speaks_of_minor(prompt) and (_is_sexual(prompt) or any(_is_sexual(text) for text in context)):
        raise PromptRefused(
            "this prompt is refused: it speaks of somebody who is or may be a minor in a sexual context. dagkit never "
            "generates that, and this check cannot be switched off. Where adults are meant, write 'adult man' or "
            "'adult woman'."
        )


def _speaks_of_minor(text: str) -> bool:
    return _has_young_age(text) or _mentions(text, _terms(_MINOR))


def _is_sexual(text: str) -> bool:
    return _mentions(text, _terms(_SEXUAL))


@cache
def _terms(listing: str) -> frozenset[str]:
    return frozenset(_plain(term.replace("_", "")) for term in listing.split())


def _plain(text: str) -> str:
    """Lower case, without accents and invisible characters, full-width and styled letters as plain ones."""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(
        character
        for character in text
        if unicodedata.category(character) not in ("Mn", "Cf", "Cc", "Me") or character in "\n\t"
    )


def _has_young_age(text: str) -> bool:
    for match in _AGE.finditer(_plain(text)):
        number = match["old"] or match["aged"] or match["under"]
        age = _NUMBERS[number] if number in _NUMBERS else int(number)
        if age < 18 or (match["under"] and age <= 21) or re.search(r"month|week|day", match[0]):
            return True
    return False


def _mentions(text: str, terms: frozenset[str]) -> bool:
    plain = _plain(text)
    for reading in {plain, plain.translate(_LOOK_ALIKES), plain.translate(_LOOK_ALIKES).translate(_LEET)}:
        tokens = re.findall(r"[^\W_]+(?:\*+[^\W_]*)*", reading)
        if any(_matches(token, terms) for token in tokens) or any(word in terms for word in _rejoined(reading, tokens)):
            return True
    return any(term in plain for term in terms if not term.isascii() and not _CYRILLIC.fullmatch(term))


def _rejoined(text: str, tokens: list[str]) -> Iterator[str]:
    """Words that were cut by punctuation or spaces, spelt letter by letter, or glued to another word of the lists."""
    yield from (re.sub(r"[\W_]", "", chunk) for chunk in text.split())
    for size in (2, 3):
        yield from ("".join(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
    run = ""
    for token in [*tokens, "  "]:
        if len(token) <= 2 and token.strip():
            run += token
            continue
        yield from (
            run[start:end] for start in range(len(run)) for end in range(start + 3, min(len(run), start + 16) + 1)
        )
        run = ""
    known = _terms(_MINOR) | _terms(_SEXUAL)
    for token in tokens:
        for cut in range(3, len(token) - 2):
            if token[:cut] in known and token[cut:] in known:
                yield from (token[:cut], token[cut:])


def _matches(word: str, terms: frozenset[str]) -> bool:
    if word in terms:
        return True
    squeezed = re.sub(r"(.)\1+", r"\1", word)
    if squeezed in _squeezed(terms) and (word != squeezed or len(squeezed) >= _FUZZY_LENGTH):
        return True
    if "*" in word and len(word) >= 3 and word.strip("*"):
        pattern = re.compile(re.sub(r"\*+", ".{1,3}", re.sub(r"[^\w*]", "", word)))
        return any(pattern.fullmatch(term) for term in terms if term.isascii())
    return len(word) >= 5 and any(
        _is_near(word, term) for term in terms if len(term) >= _FUZZY_LENGTH or _is_swapped(word, term)
    )


@cache
def _squeezed(terms: frozenset[str]) -> frozenset[str]:
    return frozenset(re.sub(r"(.)\1+", r"\1", term) for term in terms)


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
