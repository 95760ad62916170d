"""Statistics that respect topics: sums per topic, tests, the bootstrap, and rates of answers. It knows no model."""
