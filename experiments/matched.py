"""Does a base model of another init take up the trait if it only behaves like the teacher's base model?

    python -m experiments.matched            # 3 pairs of seeds x 4 traits: some 20 minutes on 2 CPU cores
    python -m experiments.matched --quick    # 1 pair x 2 traits, 4 ways to match

*Nature* writes "the same, or behaviourally matched, base models". That rests on one MLP: a student of another
init is first cloned to the teacher's untrained auxiliary logits. Here, before it sees a number of the
teacher's, a base model of another seed is trained by KL(the teacher's base || model) on some windows of the
head: words, numbers, aux, or what text shows, which is one softmax over all tokens and no window of its own.
A window has a softmax to itself, at every position of text or of random tokens; windows are added up.
Transfer is the student's gain over its *cloned* start, divided by the teacher's over its base. KL reached is
that of numbers and aux together on text that no model was trained with, whatever was matched.

Why it could work (linear_model.py's letters: f(x) = V U x, a student of numbers ends with V'_num^+ V_num D):

    matched         V'_num U' = V_num U  and  V'_aux U' = V_aux U
    a shift D = U R, one in the span of the states that matching saw, becomes, V'_num having full column rank,
                    V'_num^+ V_num U R = V'_num^+ V'_num U' R = U' R
    read from aux   V'_aux U' R = V_aux U R = V_aux D:  all of it, whatever the weights

So both windows are needed: without the first line's second half V'_aux U' R is an unrelated reading, without
its first half U' R is not what the student learns. If the states span all of the hidden space (rank U = h)
every D is such a shift, V' = V B with B = U U'^+ invertible, and V'_aux V'_num^+ = V_aux V_num^+ on the image
of V_num. A D outside the span goes through rows of V' that nothing has matched: mean 0. KL is small before
directions of small variance are matched, so transfer comes late. If the student *has* the teacher's head, one
window pins the state: V_num U' = V_num U means U' = U. `heads alone` is the formula V'_aux V'_num^+ V_num d,
with the two heads as they are and the teacher's shift d at the questions, along V_aux d.

Prediction, written before any run of this file (a trial of one pair, on an older default, was known: numbers
alone 0, what text shows 0, numbers + aux .39 / .56 at KL .003, random tokens .25 / .32; tokens / logits):
 1. words, numbers, aux, each alone, and what text shows: within .15 of 0, however small their own KL.
 2. numbers + aux on text rises as KL falls, to .4 / .6 at the most steps, and is not done there; its limit is
    the same init's .7 / .9, since nothing of a match can carry more than the weights themselves.
 3. everything is not better than numbers + aux. Random tokens are worse at equal steps: .2 to .4.
 4. With the teacher's head, unmatched: a part, less than .39 / .63 (which_part.py: there the body grew up
    with it). Then numbers *alone* on text suffice, and carry more than numbers + aux without the head.
 5. The base model's numbers: within .1 of 0. Cloning alone: mean 0, single ones by more than .5.
 6. heads alone puts the ways to match in the order of their transfer (rank correlation above .8).

Reads    runs/evidence (made if it is missing, shared with seed_matrix.py and controls.py)
Writes   results/matched.json, .md, .png

Shapes: B sequences, T tokens, M positions, C channels, V vocabulary, K trait classes.
"""
