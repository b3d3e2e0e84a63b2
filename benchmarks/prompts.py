"""Twenty prompts of different kinds: facts, code, lists, other languages, long and short."""

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
