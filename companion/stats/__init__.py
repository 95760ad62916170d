"""Statistics that respect topics: sums per topic, tests, the bootstrap, and rates of answers. It knows no model.

Public: clusters (sums per topic, statistics, tests), bootstrap (intervals, rows of evidence), rates (paired changes).
"""
