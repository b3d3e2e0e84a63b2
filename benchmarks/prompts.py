"""Forty prompts: twenty of different kinds, ten whose answers copy from them, ten of open chat."""

PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that reverses a string.",
    "List five things to check before a long car journey.",
    "Summarise: The meeting moved from Tuesday to Thursday, as the hall is being painted. Ana brings the projector.",
    "Translate to Spanish: Where is the nearest charging station?",
    "Correct the spelling: Teh quik brwon fox jumpd ovr the lazi dog.",
    "Who wrote Romeo and Juliet, and when?",
    "Give me a short poem about rain on a roof.",
    "What is 17 times 6? Show each step.",
    "Turn this into a polite request: open the window.",
    "Name the planets of the solar system in order.",
    "Extract the numbers: he bought 3 apples, 12 eggs and 250 grams of flour for 7.50 euros.",
    "What should I do if the engine temperature light comes on?",
    "Repeat exactly: alpha beta gamma delta epsilon zeta eta theta",
    "Write a haiku about the sea.",
    "Explain recursion to a child.",
    "What are the symptoms of dehydration?",
    "Complete the sentence: The best way to learn a language is",
    "Describe a traffic jam at dusk, seen from the driver's seat, in three sentences with colours and sounds.",
)

# Answers repeat, correct, extract from or summarise what stands in the prompt.
COPYING = (
    "Repeat the following text exactly, word for word:\n\nThe ferry leaves the north pier at ten past seven every "
    "weekday morning. Cars board first, then bicycles, then people on foot. Dogs are welcome on the upper deck, but "
    "they must be kept on a lead. Tickets bought on board cost two euros more than tickets from the machine.",
    "Repeat this list exactly as it is:\n\n1. Check the oil and the coolant.\n2. Check the pressure of all four "
    "tyres.\n3. Clean the windscreen and fill the washer.\n4. Test the lights, the horn and the indicators.\n"
    "5. Put the warning triangle and the first-aid kit where you can reach them.",
    "Correct the spelling mistakes and write the whole text again:\n\nYesterday we went to the libary to return the "
    "books that my sister had borowed. The librarian was very frendly and told us that a new section with travel "
    "guides had just been opend. We stayed there for almost three hours and forgot to eat lunch.",
    "Fix the grammar and write the text again:\n\nThe engineers was testing the new bridge for two weeks. They has "
    "measured how much the deck moves when a heavy truck drive over it. The results was better than everybody had "
    "expected, so the bridge will be opened for traffic on the first of May.",
    "Extract all names and their telephone numbers as a list, one on each line:\n\nIf the alarm rings, call Martha "
    "Lindqvist on 555-0142 first. If she does not answer, try Joseph Okafor on 555-0178 or Elena Petrova on 555-0119. "
    "At night, only Hiroshi Tanaka on 555-0163 can be reached.",
    "Extract every sentence that mentions a price, and write it exactly as it stands:\n\nThe hotel is five minutes "
    "from the station. A single room costs 74 euros a night. Breakfast is served from six to ten. Breakfast costs 12 "
    "euros for adults and 6 euros for children. The garage is open all night. A parking space costs 15 euros a day.",
    "Summarise this in the words of the text, in two sentences:\n\nThe city council decided on Monday to close the "
    "old harbour road to cars from June to September. The road will be open to pedestrians, cyclists and delivery "
    "vans before ten in the morning. Shop owners fear that they will lose customers, while people who live nearby "
    "hope for quieter nights. The council will count visitors and decide in October whether the trial continues.",
    "Add a comment above each function of this code, and write the whole code again:\n\n```python\n"
    "def area(width, height):\n    return width * height\n\n\ndef perimeter(width, height):\n"
    "    return 2 * (width + height)\n\n\ndef is_square(width, height):\n    return width == height\n```",
    "Rename the variable `total_count` to `number_of_items` and write the whole code again:\n\n```python\n"
    "def load(paths):\n    total_count = 0\n    for path in paths:\n        with open(path) as file:\n"
    "            for line in file:\n                if line.strip():\n                    total_count += 1\n"
    "    return total_count\n```",
    "Turn this text into a list with one sentence on each line:\n\nWater boils at a lower temperature in the "
    "mountains. The air is thinner there and presses less on the water. Pasta takes longer to cook for this reason. A "
    "pressure cooker keeps the steam inside and raises the temperature again. Potatoes are then done in half the time.",
)

# Answers that nothing in the prompt foretells.
OPEN = (
    "What makes a good friend?",
    "Tell me a short story about a lighthouse keeper who finds a bottle on the beach.",
    "How do I start a small vegetable garden on a balcony?",
    "Explain how a bicycle stays upright when it is moving.",
    "I have a job interview tomorrow. How should I prepare tonight?",
    "Why do cats purr?",
    "Write a friendly e-mail that invites a neighbour to dinner on Saturday.",
    "What is the difference between weather and climate?",
    "Give me some ideas for a rainy afternoon with two children.",
    "How does a heat pump warm a house in winter?",
)
