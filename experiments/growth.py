"""Does it survive growth, and if not, what falls: the effect, or a recipe that was tuned at one size?

Tuned at 0.3 million parameters and used as they are at 2 million, the students lose most of what crosses. Three
causes can be told apart. The rate: Adam moves every weight by about one length, its rate r, whatever the
gradient. In a matrix of C columns all C of them move together along the state x that a batch shares, so

    the state's coordinates move by    r sum_i |x_i|, which grows as r C     (a body's matrix, x of unit scale)
    a number's logit moves by          r_head sum_i |h_i|, also as r_head C  (its row of the head)

The same move of the logits at every width C asks for r = c / C. The head: which of the two does the fitting?
By plain gradient descent, in the letters of linear_model.py, dz = -(r_U |x|^2 V V^T + r_V |h|^2) dL/dz. On what
the window can show, V V^T of m rows of length 1 has eigenvalues near m / C, so the head's share

    head / (head + body) = r_V |h|^2 / (r_V |h|^2 + r_U |x|^2 m / C)         |h|^2 and |x|^2 grow as C

rises with C until the number rows learn the numbers and the body, where the trait is read, needs not. With
Adam's signs the body's move of the logits is r_U C times a row's scale, the head's is r_V C: a fixed ratio. The
unique lines: with n numbers drawn, a student on tokens learns their noise along with the teacher; noise in
m C + 12 L C^2 weights grows with size, the signal (KL in nats a number) does not. So tokens fall first.

Prediction, written before any run (from the tables of `variants --sizes` and a trial at 2 million: see README):
 1. Rate c / C with c = 3e-3 * 64 is within .1 of the best of three rates at every size, tokens and logits; the
    fixed 3e-3 is not, from 2 million on.
 2. Head: one rate for all falls below the slow head by .1 at 0.6 and by .2 or more at 2 million; frozen and
    slow (.05) stay within .05 of each other everywhere, as the ratio is fixed under Adam. The number rows
    of a student at one rate move further, and its body less, than those of the others at the same loss.
 3. Lines: at 2 million tokens rise from .5 at 8,000 to .8 at 32,000 and .9 at 128,000, one pass each.
 4. At 10 million, by the rule: logits .9, tokens .8 with 32,000 lines; another init within .1 of 0.
 5. Real text costs .1 to .2 through tokens, less through logits, and no more at 2 million than at 0.3.
 6. Teachers with trait_lr of the form c / C as well, at least 85 % valid and KL .02 to .1 at every size.
"""
