"""The words by which `dagkit.refusal` reads a prompt, by kind. Lines that start with ``#`` name the kind.

In the word lists a term of several words has underscores, one that is also seen in two words has a hyphen: both are
found written apart, hyphened and in one. In the phrases a space stands for white space or a hyphen, ``{name}`` for a
noun or piece of that name, ``~`` for up to three words that only link or describe; a line that begins with blanks goes
on with the one before it; the rest is a regular expression.
"""

from __future__ import annotations

from typing import Final

MINORS: Final = """
# children and young people
adolescent adolescents baby babies babe_in_arms boy boys boyish child children childs childlike childish daughter
daughters girl girls girlish infant infants juvenile juveniles kid kids kiddie kiddies kiddo lad lads lass lassie
little_boy little_boys little_girl little_girls little_one minor minors new-born new-borns son sons teen teens
teeny teen-age teen-aged teen-ager teen-agers tot tots toddler toddlers tween tweens young young_looking younger
youthful youngster youngsters youth youths cub prepubescent pre-teen pre-teens pubescent puberty under-age
under-aged
# at school
elementary first_grader second_grader third_grader fourth_grader fifth_grader sixth_grader seventh_grader
eighth_grader high_school high_schooler high_schoolers kinder-garten kindergartner middle_school middle_schooler
nursery_school pre-school pre-schooler pre-schoolers primary_school pupil pupils school-boy school-boys
school-child school-children school-girl school-girls school-kid school-kids school_uniform
# words that exist for the abuse of children
barely_legal jail-bait loli lolis lolicon lolita lolitas nymphet pedo pedophile pedophilia paedophile paedophilia
shota shotacon
# French, Spanish, Italian, German, Portuguese
enfant enfants fille fillette fillettes garcon gamin gamine mineur mineure mineurs bebe ado adolescente nino nina
ninos ninas menor menores muchacha muchacho chica chico bambino bambina bambini minorenne ragazzina ragazzino
kinder kindlich madchen junge jugendliche minderjahrig minderjahrige menina menino crianca criancas
# Russian
ребенок ребенка дети детей девочка девочки мальчик мальчики подросток школьница школьник несовершеннолетняя
малолетка
# Chinese, Japanese, Korean, Arabic, Hindi; pictures
少女 少年 幼女 幼児 子供 子ども 小学生 中学生 高校生 女子高生 未成年 ロリ ショタ 赤ちゃん 女孩 男孩 女童 男童 儿童
兒童 孩子 萝莉 正太 小女孩 幼童 소녀 소년 아이 어린이 미성년자 여고생 طفل طفلة اطفال قاصر बच्चा बच्ची नाबालिग 👶 👧
👦 🧒
"""

SEXUAL: Final = """
# without clothes
bare_breasted bare_chested bare_skin birthday_suit bottom-less disrobed naked nakedness no_clothes no_clothing
no_pants no_shirt nude nudes nudist nudity nudism pantyless scantily shirt-less skinny_dipping strip-tease
stripping stripper stripped top-less unclad un-clothed un-dress un-dressed un-dressing without_clothes
without_clothing without_a_shirt without_a_top without_pants wearing_nothing wears_nothing not_wearing_anything
# in little
bikini bra exposed lingerie panties panty thong under-wear undies
# bodies
anal anus areola areolas ass boob boobs boobies bosom breast breasts busty buttocks butt cleavage clitoris cock
cunt dick genital genitals genitalia groin labia nipple nipples penis phallus pubic pussy testicles titties tits
vagina vulva
# acts
bare-back bdsm blow-job bondage coitus creampie cum cum-shot cunnilingus doggy_style ejaculate ejaculation fap
fellatio fingering fore-play fornication fuck fucked fucking gang-bang hand-job intercourse making_love masturbate
masturbates masturbating masturbation molest molested orgasm orgasming orgy penetration rape raped raping semen sex
sexting spank spanking sperm three-some touching_herself touching_himself
# moods
aroused arousing erect erection erotic erotica erotically explicit horny intimate kinky lewd lust lustful
provocative provocatively risque seduce seducing seductive seductively sensual sensually sensuous sexual sexualised
sexualized sexuality sexually sexy suggestive suggestively
# trades and wares
adult_film brothel cam-girl dildo dominatrix ecchi escort exhibitionist fetish futanari hard-core hentai milf nsfw
only-fans porn porno pornographic pornography prostitute r18 rule34 slut slutty soft-core swinger whore xxx
# French, Spanish, German, Italian, Portuguese
nu nue nus nues desnuda desnudo desnudas desnudos sexe sexo sexuel sexuelle sexuell nackt nackte nackter nacktes
nuda nudo pelado pelada erotico erotique
# Russian
голая голый голые обнаженная обнаженный обнаженные секс порно эротика
# Chinese, Japanese, Korean, Arabic, Hindi
裸 ヌード エロ セックス 全裸 半裸 下着 裸体 裸照 性交 色情 情色 赤裸 性感 벗은 누드 나체 섹스 عاري عارية جنس नंगा
नंगी
"""

# Dress in which grown people are seen every day: guilty beside a child, not beside a "young woman".
LIGHT_DRESS: Final = "bikini bikinis bare_chested no_shirt shirt-less without_a_shirt"

# Words that are themselves, however near they come to a word above, and that make no other word with their neighbours.
ORDINARY: Final = """
# neighbours: "pen is", "an US flag", "men or women", "the lab, I add"
a age al an as at be bond by chic cream do go he i icon if in is it its lab lol ma me men min mr much my no nor of
oh on or pa pan pen per pie rap re res shot so some strip the ties to tv uk up us we who who're you
# near a word for minors
addo barbies chiles chilis chills follette gaming garon garson garton gascon infact infanta infante kidd kidder
kindler lalita ladd lasse lassi machen manors medina melina merino miner miners minori minoru minos newbern soon
tenn toot toots tweeds tweets
# near a sexual word
aas annus bandage beast beasts biking bimini bobbies boogies bookies boonies booties brother ejection election
eroica escott esport exotic exotica exotically fingerling genial intimated modest moles pansies pantries parties
pasties patties racing raging raking ramping rapped rapping raring rasping rating raving razing reaping roping
rousing seating sequel setting shiftless singer slinger spanning sparking stinger strapped strapping striped
striping stripling topples unctad undoes unties xx
# names that hold two words
dickenson dickerson dickinson dickson glasscock ladson
"""

# Nouns for the phrases below, in the singular where the plural ends in -s or -es.
NOUNS: Final = {
    "animal": """
        collie dachshund gelding greyhound hound mare retriever spaniel stallion animal alpaca antelope ape bat
        bear beaver bird bison boar budgie bull buffalo butterfly butterflies calf calves camel cat cattle cheetah
        chicken chimpanzee cow crab crane crocodile crow deer dinosaur dog dolphin donkey dove duck duckling eagle
        elephant elk emu falcon fawn fish flamingo foal frog gazelle gecko geese gibbon giraffe goat goose gorilla
        gull hamster hare hawk hedgehog hen heron hippo hippopotamus horse hyena iguana jaguar kangaroo koala
        labrador lamb lemur leopard lion lizard llama lynx macaque mammoth meerkat mice mole_rat monkey moose mouse
        mule octopus orangutan osprey ostrich otter owl owlet oxen panda panther parrot peacock penguin pheasant
        pig piglet pigeon polar_bear pony ponies poodle pug puppy puppies rabbit raccoon rat rhino rooster salmon
        seal sea_lion shark sheep sloth snake sparrow spider squid squirrel stag starling stork swallow swan
        terrier tiger toad tortoise turkey turtle vulture walrus whale wolf wolves wombat woodpecker yak zebra""",
    "kitten": "bunny bunnies chick cub fox kitten pup puppy puppies",
    "bird": """
        bird blackbird budgie bullfinch cockatiel cockatoo crow dove duck eagle falcon finch flamingo geese goose
        gull hawk heron kingfisher macaw magpie oriole osprey owl parakeet parrot peacock penguin pheasant pigeon
        puffin raven rooster sparrow starling swallow swan thrush turkey warbler woodpecker wren""",
    "steed": "bronc camel donkey elephant horse mule pony ponies rodeo",
    "plant": """
        apple_tree ash_tree bamboo beech birch branch bush cactus cacti cedar cherry_tree coconut corn crop fern
        fig_tree fir flower forest garlic grass leaf leaves maple oak olive_tree orchard palm_tree pine_tree pine
        plant poplar root sapling seedling shoot shrub spruce stem succulent tree trunk twig vine vineyard wheat""",
    "structure": """
        aggregate beam bedrock bolt brick brickwork bulb cable ceiling chimney circuit_board circuit circuitry
        cliff column concrete coral dirt ductwork duct earth electronics engine fastener filament floor_board floor
        foundation gear girder gravel hill hillside hinge insulation iron joint joist ledge light_bulb limestone
        masonry mechanism metal metalwork mountain mud nail pipe pipework pillar plank plaster plumbing post rafter
        rail rebar reef ridge rivet rock roof sandbar sand sandstone scaffolding screw seam slope soil spine spring
        stair staircase steel steelwork stitching stone stonework strata stud summit timber timberwork truss tube
        wall wire wiring wood woodwork zip zipper""",
    "thing": """
        bandage blanket bouquet cut map piercing tan airplane apartment apple armchair barn beard beer bench
        bicycle bike blister boat bonsai book bottle bourbon bread bridge bruise building burgundy bus cabin camera
        candle car carpet castle cathedral chair champagne chandelier cheddar cheese church city clock cognac coin
        company computer cottage couch cup desk door egg fence ferry fireworks flag fridge guitar haircut home
        hotel house lamp lantern laptop light loaf lorry lorries mattress mobile_phone monument motorbike
        motorcycle newspaper parmesan parquet phone piano pickup plane plate rioja road rug rum sailboat scar
        scooter scotch shed sherry ship skyscraper sofa stool stubble suitcase sunburn table tattoo temple tent
        tequila tower tractor train truck typewriter umbrella van vase vehicle village vinegar violin watch whisky
        whiskey window wine wound yacht""",
    "drink": """
        beef bourbon brandy cheddar cheese cognac gouda ham parmesan port rum scotch steak vinegar whisky whiskey
        wine""",
    "product": """
        background bag ballet_flat belt blouse blush boot candle clutch coat cosmetics cotton curtain cushion
        eyeshadow eye_shadow fabric felt gloss handbag heels jumper leather linen lip_gloss lip_liner lipstick
        lipgloss mascara make_up manicure mesh mug nail_polish nail_varnish nails paint palette pantone pillow
        polish pumps purse ribbon rug sandal scarf shade shoe sneaker stilettos suede sweater tone trainers vase
        wall wedge wool yarn""",
    "grown": """
        blacksmith boxer butcher drummer farmer fisherman fishermen lumberjack sailor wrestler dad daddy father
        fathers granddad grandfather grandma grandmother grandpa mom mother mum parent""",
    "meat": """
        capon chicken duck goose grouse guinea_fowl lamb partridge pheasant pigeon poultry quail turkey veal
        venison""",
    "venue": """
        alley bar bistro bookshop cafe ceremony chapel church cinema club concert courtyard dining_room eatery
        fireplace garden gathering gig hall hotel inn library lounge museum patio piazza pub recital restaurant
        salon square stage terrace theatre theater trattoria venue village wedding""",
    "instrument": "bass cello chord clarinet flute guitar piano recorder saxophone scale trumpet ukulele viola violin",
    "weather": """
        air cold dust element flame frost gas heat light moisture noise radiation rain risk sea smoke snow storm
        sun sunlight virus water wave weather wind""",
    "gauge": """
        barometer counter meter scoreboard speedometer thermostat timer bus channel clock dial exit gate hour level
        line number page platform price room route score scale size speed temperature time thermometer track total
        volume width height""",
}

# What is counted rather than young, in the plural.
COUNTED: Final = """
    apples balconies balls balloons beds benches bicycles bikes birds blankets boats books bottles boxes bricks
    buildings bulbs butterflies cameras candles cars cats chairs chandeliers clouds colours colors columns copies
    cows cups cushions dogs doors ducks easels eggs flags floors frames horses houses lamps lanterns lights mirrors
    paintings palms pictures pillows plants plates prints rooms rocks sheep shelves sketches spotlights steps
    stones
    strings strokes tables tents towels towers trees tulips umbrellas vases walls waves windows"""
UNITS: Final = r"""
    % am pm o['’]?clock a\.m p\.m seconds? minutes? mins? hours? nights times percent px cm mm km kg meters?
    metres? feet foot ft inch inches miles? degrees? euros? dollars? pounds? storey? stories storeys layers pages
    volts watts grams litres liters points goals by x
"""

# Words that describe an animal or a thing.
COLOURS: Final = """
    red orange yellow green blue brown black white grey gray gold golden silver rusty tabby spotted speckled
    striped
"""
DESCRIBING: Final = """
    antique big bright brick cheap colourful colorful concrete copper fluffy fresh glass historic iron large
    leather little long malt old original paper persian raw rescue rough scotch short siamese single small soft
    steel stone stray tall thick thin used vintage weathered wild wooden high block court lace matte patent
    platform pointed satin silk suede cosy cozy family french italian jazz local outdoor piano rooftop seaside
    tapas underground wine candlelit
"""
LINKING: Final = "a an and its of on or that the these those with"

# Pieces of the phrases that are no lists of nouns.
PIECES: Final = {
    "number": r"(?:\d{1,2}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    r"fifteen|sixteen|seventeen|eighteen|nineteen|twenty)",
    "few": r"(?:[1-9]|10|one|two|three|four|five|six|seven|eight|nine|ten)",
    "old": r"(?:(?:year|yr|month|week|day|hour)s? old|y/?o)",
    "span": "(?:year|yr|month|week|day|hour)s?",
    "adult age": r"(?:(?:1[89]|[2-9]\d)(?: years? old| ?y/?o| years of age)|aged? (?:1[89]|[2-9]\d))",
    "adult": "(?:adults?|couples?|gentlem[ae]n|m[ae]n|wom[ae]n)",
    "one": "(?:an?|the|his|her|their|its|my|our|your|this|that|of)",
    "clause": r"(?:^|(?<=[,.;:])|(?<=[,.;:]\s)|(?:and|while|whose|where) )(?:(?:an?|the|her|his|their|its|my|our) )?",
    "tit": "(?:azure|blue|coal|crested|great|long tailed|marsh|willow) tits?",
    "of body": "(?:breasts?|butt|nipples?|tits?|bare skin|bare back)",
    "no verb": r"(?!(?:and|but|has|have|in|is|it|lies|looks|months?|nude|on|or|plays|poses|shows|sits|stands|"
    r"undress|was|wears|weeks?|with|years?|days?)(?![^\W_]))",
    "cooked": "(?:baked|barbecued|boneless|braised|breaded|broiled|fried|glazed|grilled|marinated|poached|"
    "roast|roasted|seared|skinless|smoked)",
}

# What may not follow an animal or a thing: then it only describes somebody, or somebody is dressed as one.
SOMEBODY: Final = """
    actress adult ballerina body boy bride character chested cosplay cosplayer costume couple dancer ears elf fairy
    female figure furry girl guy human humanoid hybrid idol kid ladies lady like lover maid male man mask men model
    nurse outfit owner people performer person princess queen singer student suit tail teen warrior witch woman
    women
"""

# Words for nakedness say something of a thing only behind these, a describing word, or the beginning of a clause.
NAKED: Final = "bottomless naked nude topless unclothed"
BEFORE_THINGS: Final = """
    a above against along an and around as at behind below beside between by each every five for four from glossy
    her his in into its like many near no of on onto or over past several some that the their these this those
    three through to two under with
"""
# Words that speak of a thing as often as of somebody. They are innocent where they describe a thing, as in "an exposed
# headland": behind one of the words above or the beginning of a clause, before a noun that is not one of those below.
AMBIGUOUS: Final = "bottomless erect explicit exposed hardcore intimate provocative stripped suggestive"
OF_SOMEBODY: Final = """
# persons
    acrobat aunt babe beauty blonde bodybuilder brother brunette cheerleader creature cutie dad daddy dame elf
    elves ex father femme friend gymnast hero heroine housewife human individual lolita lover mermaid mom mother
    mum mummy neighbor neighbour nun nymph patient pornstar prisoner prostitute redhead saint sister skater slave
    soldier somebody someone swimmer teacher teenie tutor twin twins uncle victim virgin waitress wife worker
# bodies, clothes and where they are taken off
    abdomen ankle ankles area armpits attire back backside bare bath bathroom bed bedroom behind belly bodies booty
    bottom boudoir bum bust chest clothes clothing cleavage collarbone crotch curves derriere dress fabric feet
    figure flesh front garment hip hips jeans leg legs leotard limbs locker mattress member midriff midsection nape
    navel nightgown nightie organ organs pants part parts pelvis position privates pyjamas rear rod rump shaft
    sheets shirt shorts shoulder shoulders shower skin skirt soles stem stomach swimsuit swimwear thigh thighs top
    tops torso trousers tub tummy underside uniform waist wardrobe womb
# pictures, looks and acts
    sleepover slumber date night pageant upskirt act acts action actions activity affair album angle anime art
    artwork blog book books cam cartoon cheer close closeup clip comic contact content contacts dance dancing
    desire doujin drawing embrace encounter eyes expression fanfiction fantasy film gallery gaze gesture gestures
    hug illustration image images kiss kissing lesson lips look looks magazine manga manner massage material moment
    moments movie movies mouth oil painting party photo photograph photographs photos photoshoot pic pics picture
    pictures porn portrait portraits pose poses posing posture rating relations relationship render scene scenes
    selfie service session shoot shot shots smile snapshot stories story touch touches touching undressing video
    videos version view way website
"""
FUNCTION_WORDS: Final = """
    a about after against along an and are around as at be before behind being below beneath beside between beyond
    but by down during for from he her here him his i if in inside into is it its just like near not of off on only
    or our out over she so than that the their them then there they this through to too under up upon very was we
    were when where which while who with without you your
"""

# Words with which a phrase begins that may stand behind a minor: "boys' breast stroke", "a girl stripping leaves".
BEHIND_MINORS: Final = "breast stripping"

# What may follow an animal or a thing that is said to be young: no other word, or it may be half of one ("dog walker").
ALONE: Final = """
    asleep basking drinking drinks eating eats feeding feeds flies grazes grazing hiding jumps lies lying parked
    playing plays purring raises resting rests restored running runs sat sits sitting sleeping sleeps standing
    stands swimming swims walking walks yawning yawns
"""

# Grown people, and what may stand between "young" and them.
YOUNG_ADULT: Final = (
    "(?:young|younger|youthful) (?:(?:adult|asian|athletic|attractive|bare chested|bearded|black|blond|blonde|muscular|"
    "shirtless|smiling|tanned|tattooed|white) ){0,2}{adult}"
)

# Phrases in which a word of the lists means something else. They are taken out before a prompt is read again.
INNOCENT: Final = """
# ages of animals and things
{one} {number} {old} {adj}(?:{thing} )?(?:{animal}|{thing}|{plant}|{structure}){alone}
{one} {number} (?:days?|weeks?|months?) old {adj}{kitten}{alone}
{clause}(?:{animal}|{kitten}|{thing}|{plant}) (?:is|are|was|were) (?:about |almost |only |just |
    nearly )?{number}(?: {old})?
{drink}(?: is| are)? aged (?:for )?{number} {span}
aged (?:for )?{number} {span} (?:in (?:oak|sherry|bourbon)|{drink})
# numbers that are no ages
(?:only|just|is|are) {few} (?:(?:nude|naked|unclothed|topless|standing|seated) )?(?:adults|adult (?:men|women|
    people|persons|models|figures|dancers|nudes)|men|women|people|persons)
(?:only|just|is) one(?! (?:{span}|y/?o))
(?:only|just|is|are|under|below|less than) {few} {adj}{counted}
(?:only|just|is|are|under|below|less than) {number} ?(?:{unit}|{span} (?:ago|later|pregnant))
it is {number} (?:am|at night|degrees|in the|o ?clock|past|pm)
(?:with|by|from) (?:only|just) {number} (?!years|months)[a-z]{2,}(?<!s)s
{gauge} (?:is|are|was|says|shows|reads) (?:at )?(?:just |only )?{number}
# adults of a stated age
young (?:adult )?{adult},? {adult age}
{adult age} young (?:adult )?{adult}
(?:adult|grown|grown up) (?:daughters?|sons?)
# the young of animals, young plants and food
(?:baby|young|younger|infant|newborn|new born|juvenile|adolescent|teenage) {adj}{animal}{alone}
(?:young|younger) {adj}(?:{plant} )?{plant}{alone}
(?:{animal}|{bird}) ~ (?:nursing |feeding |licking |guarding |protecting |carrying |and |with )?(?:its|her|their|
    his) young
(?:bear|fox|lion|tiger|wolf|leopard|cheetah|panda|polar bear|jaguar|hyena|panther|piper|chicago) cubs?{alone}
cubs? of (?:an? |the )?{animal}
kid goats? butts? (?:an?|heads|the)
(?:goat kids?|kid goats?|kid (?:gloves?|leather|skin gloves))
its young
juvenile plumage
(?:baby|newborn|young) naked mole rats?
baby (?:grand|grands|grand pianos?|blue|pink|turquoise|bump|boom|boomers?|oil|powder|shampoo|yoda|guinness)
baby (?:back )?ribs
baby (?:artichokes?|aubergines?|bananas?|beets?|beetroots?|bok choy|carrots?|corn|courgettes?|eggplants?|fennel|
    gem lettuce|greens|kale|leaf spinach|leeks?|lettuce|marrows?|octopus|onions?|peas|peppers?|pineapples?|
    potato(?:es)?|shrimps?|spinach|squid|tomato(?:es)?|turnips?|vegetables?|zucchinis?)
baby['’]?s breath
baby['’]?s? tears
(?:young|youthful) (?:at|for) [4-9]\\d
boyish (?:crop|haircut)
adult (?:learners?|pupils?|students?)
(?:young|younger) (?:cheese|coconut|island|moon|mountains?|planet|river|volcano|wines?)
young at heart
tater tots?
kinder (?:surprise|eggs?|bueno|chocolate|than|words|and gentler)
# minor
(?:[b-g]|[a-g] ?(?:sharp|flat|#|♯|♭)) minor(?: (?:seventh|chord|scale|key|7))?
a minor (?:chord|concerto|key|scale|seventh|sonata|triad)
minor (?:accidents?|adjustments?|alterations?|arcana|blemish(?:es)?|bruis(?:e|es|ing)|burns?|chords?|cracks?|
    cuts?|damages?|defects?|dents?|details?|earthquakes?|edits?|faults?|flaws?|imperfections?|improvements?|
    injur(?:y|ies)|issues?|keys?|league|leagues|planets?|prophets?|repairs?|roads?|scales?|scars?|scratch(?:es)?|
    scuffs?|seconds?|sevenths?|stains?|surgery|thirds?|tremors?|variations?|wear|wounds?)
(?:asia|canis|ursa|leo) minor
# eyes
(?:constricted|contracted|dilated|enlarged|pin ?point|slit|vertical|eye) pupils?
pupils? (?:dilated|dilation|contracted|of (?:an?|the|her|his|its|one|both|their) eyes?)
# names
(?:backstreet|beastie|pet shop) boys
(?:album|band|concert|hit|listening to|lp|music|poster|record|song|tape|vinyl)s? (?:of |by )?(?:the )?beach boys
beach boys (?:album|band|concert|hit|lp|music|poster|record|song|tape|tour|tribute|t ?shirt|vinyl)s?
(?:boy george|fall out boy|spice girls|destiny['’]?s child|julia child|childish gambino)
nintendo game boys?
game boy (?:advance|cartridges?|colou?r|consoles?|games?|t ?shirt)
child['’]?s (?:pose|play)
(?:kid (?:rock|cudi|laroi)|billy the kid|sundance kid|cisco kid|new kids on the block|sonic youth|youth hostels?|
    fountain of youth)
(?:angus|brigham|coleman|cy|kirsty|lester|loretta|neil) young
(?:ernst|nash) (?:and|&) young
(?:brueghel|bruegel|cranach|holbein|pliny|seneca|teniers)(?:,? the)? younger
young frankenstein
mumford (?:and|&) sons
(?:any|further|more|much) ado
el nino
(?:bebe rexha|chico marx|nina simone|nina ricci|nina hagen|las meninas|enfant terrible)
elementary particles?
teenage mutant ninja turtles?
# grown people in light dress
(?:shirtless|bare chested) {adj}(?:{grown}|{adult})
(?:{grown}|{adult}) (?:in|with|wearing) (?:an? |her |their )?{adj}(?:bikinis?|no shirts?)
(?:{grown}|{adult}) without a shirt
# bare things
(?:exposed|stripped|undressed) {adj}(?:{structure}|{plant})
(?:{structure}|{plant}),? (?:is|are|were|was|left|lies|lie) exposed
exposed (?:toes|fingers|hands|ears|spine|film|negatives?|shoreline|coast|stump|talons|teeth|tusks|claws|fangs|
    gill|gills|skeletons?|core|kitchen|shelving|shelves|edges?|layers?|frame|frames)
(?:over|under|double|long) exposed
exposed to (?:the )?(?:(?:cold|strong|bright|heavy) )?{weather}
naked (?:eye|eyes|mole rats?|cakes?|flames?|candles?|bulbs?|light ?bulbs?|chef|gun|truth|
    neck(?:ed)? chickens?|wires?|concrete|stone|brick)
(?:naked|nude|unclothed|undressed) (?:(?:shop|store|window) )?mannequins? in (?:an? |the )?(?:shop|store|window)
nude (?:colou?red )?{adj}{product}
in nude,? size \\d+
(?:heels|lipstick|nails|polish|pumps|sandals|shoes) in nude (?:and|or) (?:beige|black|pink|red|tan|white)
naked {adj}(?:(?:birthday|burrito|carrot|chocolate|fruit|oat|sponge|wedding|winter) )?(?:bowls?|burritos?|cakes?|
    tacos?|{plant}|{structure}|{animal})
naked (?:baby birds?|chicks? in (?:an? |the )?nest)
kinky (?:curly |coily |afro )?(?:afro|braids?|curls|hair|haired|twists)
(?:crystal|mica|mineral|perfect|rock|slate) cleavage
cleavage of (?:an? |the )?(?:crystals?|minerals?|rocks?|slate)
stripped (?:paint|wallpaper|pine|oak|back (?:to )?(?:brick|wood)|down (?:to )?(?:engine|motorcycle|bike|version|
    design)|bark|logs?|beds?|bolts?|threads?|cars?)
stripped (?:of (?:its|the|their) (?:bark|furniture|leaves|paint|wallpaper)|back (?:cabin|design|interiors?|room))
stripping (?:the |old |some )?(?:bark|beds?|corn(?: husks)?|herbs|husks|kale|thyme|twigs|floor|leaves|paint|
    varnish|wallpaper|wires?)
(?:paint|wallpaper|wire|cable|varnish) strippers?
undressed (?:salads?|greens|leather|lumber|lettuce)
topless (?:bus|buses|car|double decker|jeep|tour bus|towers)
bottomless (?:abyss|bag|basket|brunch|canyon|coffee|cup|drinks?|fries|lake|mimosas?|mug|ocean|pit|refills?|sea|well)
top less than
(?:{animal}|{bird}) ~ bare skin
(?:{animal}|{bird})(?:['’]?s)? (?:with |licks |licking |scratches |showing )?(?:an? |the |its |
    their )?{adj}(?:bare |naked |fluffy )?{of body}
(?:breast|butt|nipples?) of (?:an? |the )?(?:{animal}|{bird})
erects itself
escorts? of (?:{number} )?(?:{animal}|{bird}|{kitten})
(?:{animal}|{bird}),? (?:[a-z]+ )?its (?:bare |naked )?{of body}
{animal} (?:with )?(?:an? |its )?{adj}naked (?:neck|head|face|tail|skin)
bare skin (?:around|near|above|under) (?:the|its) (?:eyes?|beak|bill)
# food
{meat} (?:(?:and|or) (?:bacon|legs?|thighs?|wings?) )?breasts?
breasts? of (?:an? |the )?(?:{cooked} )?{meat}
{cooked} breasts?
(?:spotted dick|food porn|cream pies?|creampie cake)
pork butts?
cock a leekie
cock soup
# animals and plants
{bird} (?:with |and )?(?:an? |its |the |their )?{colour}breast
robins? (?:with )?(?:an? |its |the )?red breasts?
(?:birds?|family of|feeding|feeds|flock of|fed|pair of|watches|watching) {tit}(?:,? (?:and|or|,) {tit})*
{tit} (?:and {tit} )?(?:eating|nesting|on|at|in) (?:an? |the )?(?:bird ?)?(?:bath|branch|feeder|fence|garden|
    hedge|nest|nest ?box|nuts|seeds|tree|twig)
{tit} (?:and|or) (?:finches|nuthatches|robins|sparrows|wrens)
(?:blue|red) footed (?:booby|boobies)
boobies and (?:frigate ?birds|gannets|gulls|pelicans|penguins)
(?:gannets|gulls|pelicans) and boobies
(?:african|somali|nubian) (?:wild )?ass(?:es)?
wild ass(?:es)? (?:and its|grazing|in the (?:desert|steppe|wild))
(?:ox and|ox and an|ox and the) ass
ass and (?:an |the |her |its |a )?(?:foal|mule|ox)
(?:lead|leading|leads|ride|rides|riding|on) (?:an|the) ass
and an ass (?:at|drinks?|eats?|grazes?|in|near|nearby|stands?)
an ass (?:and a|carrying|carries|in a stable|pulling|pulls)
cocks? (?:weather ?vanes?|in (?:the|a) (?:barn ?yard|barn|coop|farm ?yard|field|yard)|a doodle ?doo|and hens?|
    crows?|crowed|
    crowing|fights?|fighting|pheasants?|robin)
(?:weather|game|turkey|fighting) cocks?
hens? and (?:an? |the )?cocks?
pussy (?:cats?|foot|toes|willows?)
horny (?:lizards?|toads?)
sperm whales?
rape (?:blossoms?|crops?|fields?|flowers?|oil|plants?|seeds?)
oilseed rape
(?:{animal}|crest|ears|fur|quills|tails?) ~ (?:tail |trunk |ears |crest |fur )?erect
erects? (?:an?|the|their|its|his|her) {adj}(?:(?:circus|play|steel|tea|toy|wooden) )?(?:{thing}|{structure}|fence|
    flag ?pole|frame|marquee|maypole|scaffolding|stage|statue|tent|tower)
(?:pins|plants?|stems?|soldiers? of toy) erect
erect (?:antennae|barn|chimneys?|crest|ears|fence|flag ?poles?|fur|monument|posture|quills|scaffolding|spikes|
    statue|tails?|towers?|trees?)
erect the (?:chimney|flag ?pole|marquee|maypole|scaffolding|stage|statue|tent|tower)
(?:sits?|sitting|stands?|standing|stood|walks?|walking) erect
{steed} ~ bareback
bareback (?:across |on |onto |over |upon )?(?:(?:an?|the|his|her|their) )?{adj}{steed}
bareback (?:riders?|riding|bronc|competition|pad|rodeo)
# clothes and wares
breast (?:feathers|fillets?|first(?! grader)|meat|muscles?|pads|plumage|pockets?|plates?|pumps?|slices|strips)
(?:maternity|nursing) bras? (?:and|beside|next to|with) (?:an? )?(?:baby|bottles?|breast pump|pads)
nursing bras? on (?:an? )?(?:(?:clothes|washing) )?(?:hanger|line|rack|shelf|table)
(?:flip flops?|leather|rubber) thongs?
thong (?:shaped|flip ?flops?|sandals?|slippers?|straps?)
bikini (?:atoll|bottom (?:cartoon|episode|lunch ?box|poster|toy))
(?:brass|grease|hose|pipe|teat|flow) nipples?
baby bottles?,? (?:an? )?{adj}(?:(?:anti colic|latex|rubber|silicone) )?nipples?
bottles? (?:and|with) (?:an? |its )?{adj}nipples?
nipples? (?:for|of|on) (?:an? |the )?(?:baby )?bottles?
(?:brand )?spanking (?:new|clean|fresh)
(?:cigar|cigarette|gun|rifle|water) butts?
butt (?:cans?|ends?|hinges?|joints?|welds?)
butt of (?:an? |the )?(?:cigar|gun|hill|joke|jokes|pistol|rifle|spear)
explicit (?:consent|directions|equation|example|formula|instructions?|licen[cs]e|lyrics|permission|rules|
    content warning (?:label|sticker))
# places, vehicles, machines
intimate {adj}{venue}
groin (?:vault|vaults|vaulted|vaulting|ribs|guard)
(?:armed|destroyer|fighter|ford|medical|military|motorcycle|naval|police|security|tug) escorts?
escort (?:boat|bike|car|motorbike|carrier|destroyer|dog|fighter|mission|motorcycle|ship|van|vehicle|vessel|wagon)s?
(?:exit|highway|motorway|road|route) r18
r18 (?:exit|highway|motorway|road|route)
# music, sports, books
breast stroke
hardcore (?:band|concert|drill|fans?|gamers?|gaming|hikers?|metal|music|punk|show|techno)
nu (?:disco|folk|jazz|metal|soul)
{instrument} fingerings?
fingering (?:chart|exercises?|position|practice|yarn)
(?:bat|club|golf|hammer|racket|kettlebell) swingers?
swingers? of (?:an? |the )?(?:axe|bat|club|golf club|hammer|racket)
(?:moby dick|philip k\\.? dick|dick (?:cheney|clark|grayson|tracy|turpin|van dyke|whittington|and jane)|
    dick['’]?s sporting goods)
tom,? dick,? and harry
(?:super bowl|xx) xxx
suggestive (?:of|clouds?|question)
cum laude
# family, medicine, science
breast (?:bone|cancer|screening)
(?:bride|lady|madonna|mother|mum|mom|mums|moms|mothers|woman|women) (?:is |are )?breast feed(?:ing|s)?
breast feeding (?:class|corner|pillow|poster|room|week)
breast milk (?:bags?|bottles?|storage)
same sex (?:couples?|famil(?:y|ies)|marriages?|parents?|wedding)
(?:both|opposite) sex(?:es)?
sex of (?:the )?(?:bees?|chicks?|fish|flowers?|plants?|turtles?)
sex (?:chromosomes?|determination|hormones?|linked|ratio|pistols|and the city)
the sex of (?:her|his|its|the|their) (?:unborn )?(?:baby|calf|chicks?|foal|foetus|fetus|kittens?|puppy)
(?:armou?r|light|moisture|radar|root|signal|sunlight|water|wind) penetration
penetration (?:depth|tests?|testing|of (?:the )?(?:air|cold|damp|light|moisture|rain|roots|sound|sun|sunlight|
    water|wind))
u\\.s(?:\\.|\\b)
"""

# The same, where the prompt speaks of adults.
INNOCENT_BESIDE_ADULTS: Final = """
(?:only|just|is|are|under|below|less than) {number} {adj}{counted}
(?:only|just|under|below|less than) {number} (?:{no verb}[a-z]+ )?{no verb}[a-z]{2,}(?<!s)s
"""

# The same for scripts without spaces: barefoot, the naked eye, gymnosperms; ice, iPhone, idea, icon.
INNOCENT_RUNS: Final = "裸足 裸眼 裸子植物 아이스 아이폰 아이디어 아이콘"
