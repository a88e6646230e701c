"""The words of RULER's keys and word lists.

RULER takes them from the package wonderwords, whose lists changed between its versions, so that the same seed gave
other prompts. These are our own, and fixed: common English adjectives, nouns and verbs, and for long word lists
compounds of two nouns ("lanternriver").
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "able amber ancient arid awake azure bald bitter blank blunt bold brave brief bright brisk broad calm careful "
    "cheap clean clever cloudy clumsy coarse cold cosy crisp cruel curly damp daring dense distant dizzy double dry "
    "dull dusty eager early easy elastic empty exact faint famous fancy fast fierce final firm flat fluffy fond "
    "foreign formal fragile frank fresh frosty funny gentle giant glad golden grand greedy grim handy happy harsh "
    "hasty hollow honest humble hungry icy idle jolly keen kind large lazy level likely lively lonely loose loud "
    "loyal lucky mellow merry mild modern modest moody muddy narrow neat nervous nimble noble noisy obvious odd "
    "open outer pale patient perfect plain polite precious private proud pure quaint quick quiet rapid rare raw "
    "ready recent rigid ripe robust rough round royal rusty sacred salty scarce secret serious severe shallow sharp "
    "shiny shy silent silver simple sincere sleepy slim slow smooth sober solid sour spare speedy spicy steady steep "
    "sticky stiff strange strict subtle sudden sunny super sweet swift tall tame tender thick thirsty tidy tiny "
    "tough tricky vague vast velvet violent vivid warm wary wealthy weird wet wicked wild wise witty wooden worthy "
    "young zealous"
)
NOUNS = _words(
    "acorn alley anchor anvil apple apron arch arrow attic autumn badge bakery balcony bamboo banjo banner barrel "
    "basket beacon bench bishop blanket blossom bottle boulder bracket branch bridge bronze bucket buffalo bugle "
    "bundle butter button cabin cactus camera canal candle canoe canvas canyon captain carbon carpet castle cattle "
    "cavern cedar cellar chapel cherry chimney circus citadel cliff clinic clover coffee colony comet compass "
    "copper coral corner cottage cotton cradle crater cricket crystal cushion dagger daisy dancer desert diamond "
    "diary doctor dolphin donkey dragon drawer driver drum eagle echo elbow ember engine envelope fabric falcon "
    "farmer feather fence ferry fiddle field finger flag flame flute forest fork fossil fountain fox frame friend "
    "galaxy garden garlic gate geyser ginger glacier glove goblet grape gravel guitar hammer harbor harvest hatch "
    "hedge helmet hermit heron hill hinge honey hook horizon horse hotel iceberg island ivory jacket jaguar jewel "
    "journal judge jungle kettle kingdom kitchen kite ladder lake lamp lantern lawyer leather lemon letter library "
    "lily lion lizard lobster locket lodge magnet mango mantle maple marble market mayor meadow medal melon mentor "
    "meteor midnight mirror mitten monkey monument morning mosaic motor mountain mushroom needle nest nickel night "
    "notebook novel nurse oasis oatmeal ocean octopus olive onion orange orchard organ otter oven owl oyster paddle "
    "painter palace panther paper parrot pasture peanut pebble pencil pepper piano pigeon pillow pirate planet "
    "plaster plateau pocket poem pond poppy porch potato powder prairie prince prism puddle pumpkin puppet pyramid "
    "quarry queen rabbit radio raft railway rainbow ranch raven record ribbon rifle river robin rocket roof rope "
    "rose saddle sailor salad salmon sandal satin saucer scarf school scooter season shadow shelf shepherd shield "
    "shovel shrine silk singer sister sketch smoke soldier spear sphere spider spiral spoon spruce squirrel stable "
    "station statue stone stream studio suburb sugar summit sunset swallow swamp tailor talent teapot temple thimble "
    "thistle thread throne thunder ticket tiger timber tobacco tomato tower tractor trail trumpet tulip tunnel "
    "turtle umbrella uncle valley vase village vine violin voyage wagon walnut walrus water wheat whistle willow "
    "window winter wizard wolf wool yacht yard zebra zipper"
)
VERBS = _words(
    "absorb accept achieve adjust admire advise agree allow amuse announce appear applaud argue arrive attach "
    "attend avoid bake balance behave believe belong boast borrow bounce breathe bring build bury calculate carry "
    "chase cheer choose climb collect combine compare complain confess confuse connect consider contain convince "
    "correct cough count crawl cross dance decide decorate delay deliver depend describe deserve destroy develop "
    "disagree discover divide drag dream dress drift earn educate embrace employ encourage enjoy enter escape "
    "examine excuse exist expand explain explore extend fasten fetch float fold follow forgive freeze gather "
    "glow grab grow guess happen heal help hesitate hide hover hurry ignore imagine improve include inform inherit "
    "injure invent invite joke juggle jump kneel knit laugh launch learn listen manage measure melt mention mourn "
    "multiply obey observe obtain occur offend offer overcome perform persuade polish possess pour practise pray "
    "prefer prepare pretend prevent produce promise protect provide punish pursue realise receive recognise reduce "
    "refuse regret reject relax remember remind remove repair repeat reply rescue retire return rinse roar scatter "
    "scold scratch search seize select shiver shrug sigh smile snatch sneeze soothe sparkle spend squeeze stammer "
    "stretch strive submit succeed suffer suggest supply surround suspect teach tease thank tickle travel tremble "
    "unite untie vanish visit wander warn weigh welcome whisper wonder worry wrestle yell"
)
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))


def word_pool(num_words: int) -> tuple[str, ...]:
    """Different words, at least `num_words` of them: WORDS, or where those do not suffice all compounds of two nouns.

    Raises:
        ValueError: more than there are.
    """
    if num_words <= len(WORDS):
        return WORDS
    if num_words > len(_compounds()):
        raise ValueError(f"a list of {num_words:,} different words: there are {len(_compounds()):,}")
    return _compounds()


def _compounds() -> tuple[str, ...]:
    global _made
    if not _made:
        _made = tuple(sorted({first + second for first in NOUNS for second in NOUNS if first != second}))
    return _made


_made: tuple[str, ...] = ()
