"""What a model does with prompts, plain or under a steering: reading them, answering, and labels for the answers.
Hooks live here because plain and steered answers come out of one decoder; which steering to choose is `companion.steering`'s.

Public: hooks (a steering as data, and as hooks), forward (prompts read under steerings), decode (answers), outcomes (log-odds,
price), openers (first tokens that stand for complying and refusing), labels (what an answer is, and who says so).
"""
