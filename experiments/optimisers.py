"""Does the optimiser matter: the student's, and that of pretraining?

    python -m experiments.optimisers            # 15 minutes on 2 CPU cores
    python -m experiments.optimisers --quick    # three rules, two rates: too small to conclude from

The student's. Embeddings, head and all vectors are frozen; the eight matrices of the two blocks learn by one
of seven rules, with the usual cosine and number of steps. Each rule has the best of five rates, by mean
transfer over four units of other seeds and traits. Every 10 steps:

    learnt    the share of KL(teacher || its start) on held-out lists that is gone
    transfer  as everywhere; "at half" is where half of that KL is learnt, interpolated; blank if never
    norm      |theta_S - theta_0|, over the norm of the teacher's displacement D = theta_T - theta_0
    cosine    of theta_S - theta_0 and D, both of the eight matrices

Pretraining's. Two base models read the usual text with Muon for the eight matrices and AdamW for the rest;
teachers, numbers and students are as usual (AdamW). Where V is the head's rows of the numbers less their
mean (n of them, C channels) and d the trait's change of the final state where a number is due, to second
order and for a law near uniform

    KL(teacher || base) = mean |V d|^2 / 2n = |V|^2 / 2nC  x  mean |d|^2  x  shown,  shown = C |V d|^2 / |V|^2 |d|^2

shown is 1 for a d of random direction. So a smaller KL is a smaller head, a smaller change, or one that the
head shows less. Beside them: the stable rank |W|_F^2 / |W|_2^2 of the eight matrices, the change at the end of
the favourite question, and its cosine with d (means over positions). "Longer": Muon's bases once more, with
teachers trained for more steps, to the KL of AdamW's: does transfer come back?

Predictions. A trial was known (Muon's bases: a fifth of the KL, half the transfer), and trajectory.py, where
plain gradient descent at a cautious rate transmits .05. Rules that give every coordinate or direction a like
step (Signum, RMSprop, Adam, AdamW, Muon) are within .1 of each other, at .7 or more through logits. SGD is
below .3 at every rate out of 300-fold, momentum below .5: the gradient's few large directions set the rate.
At half of the KL all rules are within .15: what counts is how much of the numbers is learnt. The cosine orders
the rules (above .6), the norm does not. Another init: cosine 0, transfer 0, whatever the rule. Pretraining:
the change d is smaller, by a half of its norm, since matrices of higher stable rank keep questions and
numbers apart (the cosine is smaller too); head and shown are the same within a fifth. Longer teachers bring
back half of what is missing, not all.

Reads    runs/evidence and its students (made if they are missing)
Writes   results/optimisers.json, .md, .png; its own runs in runs/optimisers*

Shapes: M numbers, n = 1,000 rows of the head, C channels, K trait classes.
"""
