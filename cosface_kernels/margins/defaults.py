"""The numbers that a loss and its margin have by default: those of the papers, or of their code where it differs.

The docstrings of both name the source. Angles are in radians. A switch that is off by default is not listed.
"""

SCALE = 64.0  # s of CosFace, ArcFace and most that came after
RATE = 0.01  # of averages over batches

COSFACE_MARGIN = 0.35

ARCFACE_MARGIN = 0.5
SUBCENTERS = 3

COMBINED_MARGINS = (1.0, ARCFACE_MARGIN, 0.0)  # m1, m2, m3

SPHEREFACE_MARGIN, SPHEREFACE_SCALE = 1.7, 30.0

A_SOFTMAX_MARGIN = 4.0
A_SOFTMAX_BASE, A_SOFTMAX_GAMMA, A_SOFTMAX_LAMBDA_MIN = 1000.0, 0.12, 5.0

L_SOFTMAX_MARGIN = 4.0

MV_SOFTMAX_MARGIN, MV_SOFTMAX_T, MV_SOFTMAX_SCALE = 0.35, 0.2, 32.0

ADAFACE_MARGIN, ADAFACE_H = 0.4, 0.333

MAGFACE_MARGINS = (0.45, 0.8)  # l_m, u_m
MAGFACE_NORMS = (10.0, 110.0)  # l_a, u_a
MAGFACE_REGULARIZER = 35.0  # lambda

KAPPAFACE_MARGIN, KAPPAFACE_TEMPERATURE, KAPPAFACE_GAMMA = 0.8, 0.4, 0.7

X2_SOFTMAX_PARABOLA = X2_SOFTMAX_A, X2_SOFTMAX_H, X2_SOFTMAX_K = -0.9, 0.0, 0.65

GB_COSFACE_MARGIN, GB_COSFACE_ALPHA, GB_COSFACE_SCALE = 0.16, 0.15, 32.0
GB_COSFACE_BOUNDS = (0.5, 0.7)

ELASTICFACE_STD = 0.05

ADAM_SOFTMAX_MARGIN, ADAM_SOFTMAX_REGULARIZER, ADAM_SOFTMAX_SCALE = 0.35, 70.0, 32.0

LDAM_MARGIN = 0.5
DYNAMIC_MARGINS = (0.05, 0.5)  # smallest, largest
