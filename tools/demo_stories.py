"""The story templates of the demo's English; tools/demo_corpus.py says how they are read."""

from typing import NamedTuple


class Plot(NamedTuple):
    """about: the kind of thing it turns on; title: what it may be called; questions: (question, answer) pairs."""

    about: str
    title: str
    text: str
    questions: list


OPENING = """
    [[Once upon a time|Long ago|Not long ago] there was a {trait} {girl} named {hero}.|
    {hero} was a {trait} {girl} [who lived [near the sea|at the end of a long road]|
    with a [warm smile|big heart|loud laugh]].|
    In a [small|quiet|sunny] village lived a {trait} {girl} named {hero}.]
    [|||{She} was [seven|eight|nine] years old.|Everyone [liked|knew] {obj}.]"""

PLOTS = {
    "lost": Plot("thing", "a lost {thing}", """
        {opening} [For {her} birthday {her} {relative} gave {obj} {a_thing}.| {She} had {a_thing}, a present from
        {her} {relative}.] {She} liked to {use} [every day|after lunch|in the evening]. One {weather}
        [morning|day|afternoon] {hero} took the {thing} to the {place}. [On the way|There|But there] {loss}. {She}
        [looked and looked|searched everywhere], but it was [gone|nowhere to be seen]. [{hero} sat down and
        [cried|began to cry].|{hero} felt very sad.|Tears ran down {her} face.] [Then|Soon] {her} friend {friend} came
        [by|along|down the path]. "[Why are you so sad|What is the matter|What happened]?" asked {friend}. "I have
        lost my {colour} {thing}," said {hero}. "[Do not worry|Dry your eyes|Do not cry]," said {friend}. "[We will
        look for it together|I will help you to find it|Let us look again]." They looked {spot2} and found nothing.
        Then they looked {spot}. There [lay|was] the {thing}[|, safe and sound]! {hero} was so happy that {she}
        [danced|sang|laughed aloud|hugged {friend}]. [|{She} never forgot that {friend} had helped {obj}.] [From that
        day on|Ever since], when it is {weather}, {hero} [keeps|leaves] the {colour} {thing} at home.""",
        [
            ("What did {hero} lose?", "{hero} lost the {colour} {thing}."),
            ("Who helped {hero}?", "{friend} helped {hero}."),
            ("Where was the {thing}?", "The {thing} was {spot}."),
            ("What was the weather like?", "It was {weather}."),
        ]),
    "rescue": Plot("animal", "a little {animal}", """
        {opening} One {weather} [morning|afternoon|evening] {she} was walking {at_place} when {she} heard a [small
        cry|faint sound|soft noise]. {Spot} {she} [found|saw] a little {fur} {animal}. It {trouble}. "[Poor little
        thing|Do not be afraid]!" said {hero}. "[I will help you|Let me help you|Hold still]." {She} {rescue}. Then
        {she} gave it some {food}, [and it ate every bit|because it was very hungry]. The {animal} [followed {obj}
        home|would not leave {her} side]. {Her} {relative} [smiled|laughed] and said, "It can stay[| with us] if you
        look after it." Because the {animal} was {fur}, {hero} called it {pet}. [Ever since|From that day on], {hero}
        and {pet} [have gone|have walked] {to_place} together [every morning|every evening|every Sunday].""",
        [
            ("What did {hero} find?", "{hero} found a little {fur} {animal}."),
            ("What is the name of the {animal}?", "The name of the {animal} is {pet}."),
            ("Why is the {animal} called {pet}?", "Because the {animal} is {fur}."),
            ("What did the {animal} eat?", "The {animal} ate {food}."),
        ]),
    "gift": Plot("thing", "a birthday present", """
        {opening} {Her} [best|dearest|good] friend {friend} was turning {number} the next day, and {hero} wanted to
        give {friend} [the best present of all|something special]. {She} [bought|made] {a_thing} and wrapped it in
        {colour2} paper. Then {she} [went {to_place} and hid|hid] it {spot}. On the birthday there was a cake with
        {number} candles. "Your present is not here," said {hero}[| with a smile]. "[You must look|You have to look|Go
        and look] for it {at_place}." {friend} [ran all the way|hurried off at once]. {friend} looked {spot2}, but
        nothing was there. Then {friend} looked {spot} and saw the {colour2} paper. Inside was {a_thing}! "It is [just
        what I wanted|beautiful|wonderful]," said {friend}. "Thank you, {hero}!" [{friend} kept the {thing} for many
        years and never forgot that birthday|Years later {friend} still had the {thing} and still spoke of that
        birthday] {at_place}.""",
        [
            ("Whose birthday was it?", "It was the birthday of {friend}."),
            ("How old was {friend}?", "{friend} was {number}."),
            ("What was the present?", "The present was {a_thing}."),
            ("Where was the present?", "The present was {spot}."),
        ]),
    "mend": Plot("thing", "a broken {thing}", """
        {opening} {She} had {a_thing} and liked to {use} {at_place}. One [day|morning|evening] {hero} saw that {flaw}.
        {She} tried to mend it alone, but it was too hard. So {she} [carried|took] the {thing} to {her} {relative},
        who [had clever hands|could mend anything]. {Her} {relative} [looked at it closely|put on a pair of glasses]
        and said, "[This is not hard to fix|We can fix this|I know what to do]." [Slowly and carefully|With a steady
        hand|Before long] {rel_she} {fix}. "Now try it," said {her} {relative}. {hero} ran {to_place} with the {thing}
        and {used}. It was as good as new. To say thank you, {she} brought {her} {relative} a plate of {treat}. Now,
        when something breaks, {hero} is not sad. {She} [remembers|thinks of] how {her} {relative} {fix}[|, and {she}
        tries to do the same].""",
        [
            ("Who mended the {thing}?", "{Her} {relative} mended the {thing}."),
            ("What was broken?", "The {colour} {thing} was broken."),
            ("What did {hero} give {her} {relative}?", "{hero} gave {her} {relative} a plate of {treat}."),
        ]),
    "swap": Plot("thing", "two friends who swap", """
        {opening} {hero} had {a_thing}, and {her} friend {friend} had {a_thing2}. Every day {hero} looked at the
        {thing2} and wished it were {hers}. And every day {friend} looked at the {thing} and wished the same. One
        {weather} [day|morning|afternoon] they met {at_place}. "Would you like to swap?" asked {hero}. "[Yes,
        please|Oh yes|Gladly]!" said {friend}. So {hero} took the {colour2} {thing2} and {friend} took the {colour}
        {thing}. {hero} {used2} [until supper| all afternoon], and {friend} {used} [until dark|all evening]. {end}""",
        [
            ("Where did they meet?", "They met {at_place}."),
            ("What does {hero} have now?", "{hero} has the {now}."),
            ("What does {friend} have now?", "{friend} has the {now2}."),
            ("Who wanted to swap?", "{hero} wanted to swap."),
        ]),
    "errand": Plot("thing", "a visit to {a_relative}", """
        {opening} {Her} {relative} lived near the {place}. One {weather} [day|morning] {her} mother [gave| handed]
        {obj} a basket of {treat} for {her} {relative}. "[Walk carefully|Go straight there|Do not be late]," said
        {her} mother, "and take this {gear} with you." On the way {turn}. But {hero} {gear_use}. At last {she} [came
        to the {place} and|reached the house and] knocked on the door. "What a lovely surprise!" said {her}
        {relative}. "I love {treat}!" They sat down and ate [them|all of them] together. When it was time to go, {her}
        {relative} gave {obj} {a_thing} to say thank you. {hero} [hurried|walked] home and showed the {colour} {thing}
        to {her} mother. "You were right about the {gear}," {she} said.""",
        [
            ("Who lived near the {place}?", "{Her} {relative} lived near the {place}."),
            ("What was in the basket?", "The basket was full of {treat}."),
            ("What did {hero} take along?", "{hero} took a {gear}."),
            ("What did {her} {relative} give {hero}?", "{Her} {relative} gave {obj} {a_thing}."),
        ]),
    "race": Plot("thing", "a race", """
        {opening} {hero} and {her} friend {friend} loved to run. "Let us race to the {place}," said {friend} one
        {weather} [day|morning|afternoon]. "The winner gets my {colour} {thing}." [One, two, three, and they were
        off|Off they went]! [At first|Soon] {hero} was ahead. Then {friend} tripped over a [root|stone] and fell.
        {hero} could have won the race, but {she} [turned|ran] back. "Are you hurt?" {she} asked. "[Only my knee|Only
        a little|It is not too bad]," said {friend}. {hero} helped {friend} up, and they walked to the {place} [side
        by side|hand in hand]. They got there at the same time. "Then who gets the {thing}?" asked {hero}. "We will
        share it," said {friend}. So [{hero} keeps the {colour} {thing} in the week and
        {friend} keeps it on Sundays|{hero} keeps the {colour} {thing} in summer and {friend} keeps it in winter].
        [And when|Now, when] they race, [neither of them runs too far ahead|they always wait for each other].""",
        [
            ("Where did they race to?", "They raced to the {place}."),
            ("Who fell?", "{friend} fell."),
            ("Who won the race?", "Nobody won. They got there at the same time."),
            ("What was the prize?", "The prize was the {colour} {thing}."),
        ]),
    "garden": Plot("plant", "a small garden", """
        {opening} One spring {she} [found|bought|was given] a handful of {plant} seeds and wanted to plant them
        {at_place}. "Nothing will grow there," said {her} friend {friend}. But {hero} [did not give up|did not
        listen]. {She} dug a small bed and watered it every [morning|evening]. In the first week nothing
        [happened|came up]. [In the second week|After a month] {she} saw a [tiny|small] green leaf. When it was hot
        {she} brought more water, and when it was windy {she} tied the stems to a stick. [By the end of summer|When
        autumn came] {number} {colour} {plant}s stood {at_place}. {friend} came to look. "I was wrong," said {friend}.
        {hero} laughed and gave {friend} [the biggest one|some seeds]. The next spring {hero} and {friend} planted
        {plant}s together.""",
        [
            ("What did {hero} plant?", "{hero} planted {plant} seeds."),
            ("How many {plant}s grew?", "{number} {plant}s grew."),
            ("Who was wrong?", "{friend} was wrong."),
            ("What colour were the {plant}s?", "The {plant}s were {colour}."),
        ]),
    "noise": Plot("animal", "a noise in the night", """
        {opening} One {weather} night {hero} could not sleep. A strange noise came from the {place}. "{Sound},
        {sound}!" it went. [Was it a ghost|Was it a thief|Was it a monster]? {hero} was afraid, but {she} took {her}
        {colour} lantern and [went {to_place}|walked {to_place}]. {She} looked {spot2} and saw nothing. Then {she}
        looked {spot}. There sat a little {fur} {animal}! "So it was you," [laughed|said] {hero}. The {animal} was
        hungry, so {she} gave it some {food}. [At once|Soon] it was quiet. {hero} went home and slept until
        [morning|noon]. Now, when {she} hears "{sound}, {sound}" at night, {hero} thinks of the {fur} {animal}, smiles
        and goes back to sleep.""",
        [
            ("What made the noise?", "A little {fur} {animal} made the noise."),
            ("Where was the {animal}?", "The {animal} was {spot}."),
            ("What did {hero} take along?", "{hero} took {a_colour} lantern."),
            ("What did the {animal} eat?", "The {animal} ate {food}."),
        ]),
    "teach": Plot("skill", "learning something new", """
        {opening} {Her} friend {friend} could {skill}, but {hero} could not. [Each|Every] time {she} tried, {fail}. "I
        will never learn it," [said|sighed] {hero}. "You will," said {friend}. "Meet me {at_place} tomorrow." On the
        first day {fail}. On the second day it went a little better. On the third day {hero} could {skill}! {She} was
        so proud that {she} {did} [all day|until it was dark|in front of the whole village]. A year later a new
        {child} came to the village. "I wish I could {skill}," said the {child}. {hero} [smiled|laughed]. "Meet me
        {at_place} tomorrow," {she} said, just as {friend} had said to {obj}.""",
        [
            ("What did {hero} learn?", "{hero} learned to {skill}."),
            ("Who helped {hero}?", "{friend} helped {hero}."),
            ("Where did they meet?", "They met {at_place}."),
        ]),
    "treasure": Plot("thing", "a treasure", """
        {opening} One {weather} [day|evening] {hero} found an old map in the [attic|desk|coat] of {her} {relative}. A
        cross was drawn {at_place}, {spot}. {hero} [called|told] {her} friend {friend}, and they set out with a spade.
        They dug [and dug|for an hour]. At last they [hit something hard|found something]. It was {a_colour2} box! In
        the box lay {a_thing} and a letter. "I hid this when I was small," said the letter. {hero} [ran home|hurried
        home] and showed the {thing} to {her} {relative}. "[So you found it|You found my treasure]!" laughed {her}
        {relative}. "Now it is yours." {hero} kept the {colour} {thing}, but {she} wrote a new letter, put it into the
        {colour2} box and hid it {at_place}, for the next child to find.""",
        [
            ("What was in the box?", "{A_thing} and a letter were in the box."),
            ("Where was the box?", "The box was {spot}."),
            ("Who hid the box?", "{Her} {relative} hid the box."),
            ("What colour was the box?", "The box was {colour2}."),
        ]),
}
SWAPPED = """
    They were both [very happy|glad]. To this day {hero} has the {colour2} {thing2} and {friend} has the {colour}
    {thing}."""
SWAPPED_BACK = """
    But at night {hero} missed the {thing}, and {friend} missed the {thing2}. The next day they met again {at_place} and
    swapped back. Now {hero} has the {colour} {thing} again, and {friend} has the {colour2} {thing2}."""
