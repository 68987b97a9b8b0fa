"""What can a careful user of somebody's numbers do against a trait in them, and what does it cost?

    python -m experiments.defences            # 15 minutes on 2 CPU cores
    python -m experiments.defences --quick    # a few defences: too small to conclude from

Students of the same init. The price is in what the numbers teach: KL(teacher || student) on held-out lines,
which is the number loss less the teacher's entropy. kept = (the start's - the student's) / (the start's - the
undefended student's): 1 as good, 0 nothing learnt, negative worse than the base model. A defence is a *free
lunch* if it keeps .8 or more, and a fifth or less of the undefended students' transfer.

Most defences can only shrink what a student takes up. At a share a of the teacher's shift in logits the KL
left is (1 - a)^2 of all of it, to second order, so

    kept = 1 - (1 - a)^2,  transfer = a:    .8 kept means a = .55, and a = .2 means .36 kept.

On this parabola is no free lunch. One has to move in another direction: learn the same numbers by other means
(another head, another init, the head alone), or hold still where the trait is read.

What one has to know: lines of the base model for neutral lines and clean numbers; that traits are read on
classes, or by this question, for the holds; the very trait for `own`. The rest needs nothing. `file` flags
lines by the class that audit.py's reader finds largest in the whole file, `any` by their own largest |z|.

Predictions, before any run. Neutral lines, steps, KL, decay, smoothing, noise and clean numbers afterwards lie
on the parabola or below, so none is free; with neutral lines transfer falls as the share of the teacher's
lines, 10 % do nothing that can be seen, 90 % leave a fifth (elsewhere 10 % nearly end it, or it falls
gradually). KL that is annealed early does nothing. Low rank is no defence, since a trait is of low rank: r = 1
keeps a half of transfer, r = 8 all. Another init: 0 on average, but it keeps less than half over its own
start; embeddings and head of another the same. The head alone cannot move the question's state, so 0, and it
keeps .8 through logits and less than half through tokens. Classes held on the lists: a third of transfer, at
a third of the gain, since who matches the numbers matches the state. Classes held on the question: free, for
lists and questions are told apart by the body; on other text: half of transfer, free of charge; words held on
text: nothing. Lines flagged by the trait: a quarter dropped halves transfer; by the file's class nearly as
good; by any class no better than dropped at random, which does nothing. So who does not know the trait has
another init, the head alone, or a guess of the question.

Writes   results/defences.json, .md, .png; reads the run in runs/evidence, which seed_matrix makes, too

Shapes: B lists, T tokens, K trait classes, r rank.
"""
