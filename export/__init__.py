"""The model developer: draws secret permutations and writes the two halves of a bundle."""
