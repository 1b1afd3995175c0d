"""Whether a caption is English: a rule of words, for pictures whose language no one stated.

FLAVA keeps the English captions of YFCC100M and does not say how they were found. The rule here is short enough to be
stated. A caption is English if at least nine tenths of its letters are a to z, and if it has more of the commonest
words of English than of those of any other language below (words that are common in English do not count for others).
Without a common word of any of them it passes: names of places and things do, whose language cannot be told, and so do
languages that are not listed.
"""

from __future__ import annotations

import re

COMMON_WORDS = {
    "English": """a about after all an and are as at be been before behind but by do during each for from had
        has have he her his how i if in into is it its just me my near no not of off on one or our out over she
        some that the their them then there these they this those to two under up us very view was we were what
        when which while who will with you your""",
    "German": """am auch auf aus bei beim bin das dem den der des die ein eine einem einen einer eines es für ich im ist
        mit nach nicht noch nur oder sich sie sind über und unter vom von vor war wie wir wird wurde zu zum zur""",
    "French": """au aux avec ce ces cette chez dans de depuis des du elle en entre est et il je la le les ma mes mon
        nos notre nous par pas pour que qui sa ses son sur un une vous""",
    "Spanish": """al como con de del desde el en entre es esta está este fue ha hay la lo más muy nos para pero por que
        se sobre son su sus un una y""",
    "Italian": """al alla anche che come con da dal dalla dei del della delle di è e gli ho il la le lo mia mio nel
        nella non per più questa questo si sono sul sulla tra un una""",
    "Portuguese": """ao as com como da das de do dos e é em entre esta este foi mais meu minha na nas no nos não o os
        para pela pelo por que são se seu sua um uma""",
    "Dutch": """aan als bij dan dat de deze dit door een en er het heeft maar met mijn naar niet nog om onze ook op te
        tijdens uit van voor werd wij wordt zijn""",
    "Scandinavian": """att av den det då ei en er ett fra från för han hon har ikke inte jag jeg med min mitt mot och
        og om på som till til under ut var ved vi vid är efter etter""",
    "Polish": "ale był była czy dla do i jak jest na nad nie o od oraz po pod przez przy się to w z za że",
    "Turkish": "ben bir biz bu çok da daha de en gibi için ile kadar ne olan sonra var ve",
    "Indonesian": "ada adalah akan dalam dan dari dengan di ini itu juga kami ke oleh pada saya tidak untuk yang",
}
_ENGLISH = frozenset(COMMON_WORDS["English"].split())
_OTHERS = [frozenset(words.split()) - _ENGLISH for name, words in COMMON_WORDS.items() if name != "English"]
_WORD = re.compile(r"[^\W\d_]+")


def is_english(caption: str) -> bool:
    letters = [character for character in caption if character.isalpha()]
    if not letters or sum(character.isascii() for character in letters) < 0.9 * len(letters):
        return False
    words = _WORD.findall(caption.lower())
    english = sum(word in _ENGLISH for word in words)
    other = max(sum(word in common for word in words) for common in _OTHERS)
    return english > other or english == other == 0
