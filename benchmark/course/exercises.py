"""The exercises: what make.py writes in the place of a body, and into the folder's README; and the variants.

An exercise is what stands between `# exercise N: title` and `# end of exercise N` in a script. Variant 0 is
the scripts as they are. Any other changes scripts and texts before the bodies are taken out: every (old, new)
pair of `substitutions` is applied wherever `old` stands, with {name} a constant of the variant.
"""

import random
from dataclasses import dataclass

ONLINE, OFFLINE, CPQ = "marvel_sac_pid.py", "offline_pretrain.py", "benchmark/baselines/cpq.py"
# the scripts' own values, which are those of variant 0, and what the other variants draw from
CONSTANTS = {
    "squash": (1.0, [1.25, 1.5, 1.75, 2.0, 2.5, 3.0]),
    "end_reward": (0.0, [-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]),
    "end_cost": (0.0, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]),
    "cost_entropy_sign": ("-", ["+", "-"]),
    "follow_every": (1, [2, 3, 4, 5]),
    "leak": (0.0, [0.02, 0.04, 0.05, 0.08, 0.1]),
    "kappa": (1.0, [0.25, 0.5, 1.5, 2.0, 3.0]),
    "share": (1.0, [0.2, 0.3, 0.4, 0.6, 0.7, 0.8]),
    "hinge": (1.0, [0.7, 0.8, 0.9, 1.1, 1.2, 1.3]),
}


def constants(variant: int) -> dict[str, float | int | str]:
    """The constants of a variant; 0 is the scripts as they are."""
    if variant == 0:
        return {name: own for name, (own, _) in CONSTANTS.items()}
    draw = random.Random(variant)
    return {name: draw.choice(others) for name, (_, others) in CONSTANTS.items()}


@dataclass(frozen=True)
class Exercise:
    title: str
    minutes: int
    tasks: dict[str, tuple[str, ...]]  # of a script: one for every body that it marks, in their order
    equations: str
    sanity: str
    substitutions: tuple[tuple[str, str], ...]


EXERCISES = {
    1: Exercise(
        title="log-density of the squashed Gaussian",
        minutes=60,
        tasks=dict.fromkeys(
            (ONLINE, OFFLINE, CPQ),
            (
                """\
Given: mean, log_std and noise ~ N(0, I), each (batch, act_dim). Draw u ~ N(mean, std^2) from the noise, so
that gradients reach mean and log_std, and squash it: a = tanh(u). Return a (batch, act_dim) and log pi(a |
s) (batch,), in nats: the density of the action, not of u. It must stay finite in float32 where tanh rounds
to 1: write log(1 - tanh(x)^2) without a difference. All scripts need it, with the same lines.""",
            ),
        ),
        equations="""\
The density of a = tanh(u) follows from that of u by the change of variables: log π(a | s) = Σ_i [ log
N(u_i; mean_i, std_i²) - log |da_i / du_i| ]. (SAC, appendix C.) Find a form of log(1 - tanh² x) that is
right at x = 20, where 1 - tanh² x rounds to 0.""",
        sanity="The histogram of 20,000 samples lies on your density, and the density integrates to 1.",
        substitutions=(
            ("a = tanh(u)", "a = tanh(u / {squash})"),
            (
                "        log_det_tanh = 2 * (math.log(2) - u - F.softplus(-2 * u))"
                "  # log(1 - tanh(u)^2) without cancellation\n",
                "        x = u / {squash}\n"
                "        log_det_tanh = 2 * (math.log(2) - x - F.softplus(-2 * x)) - math.log({squash})\n",
            ),
            ("return u.tanh(), (log_normal", "return x.tanh(), (log_normal"),
            ("return np.tanh(mean)", "return np.tanh(mean / {squash})"),
            (
                "u = act.clamp(-MAX_ACTION, MAX_ACTION).atanh()",
                "u = {squash} * act.clamp(-MAX_ACTION, MAX_ACTION).atanh()",
            ),
        ),
    ),
    2: Exercise(
        title="critic targets",
        minutes=60,
        tasks={
            ONLINE: (
                """\
batch: dict of tensors, first dimension batch; batch["rewards"] is scaled, batch["costs"] is not, both are
per step. actor(obs) gives a sample (batch, act_dim) and its log-density (batch,). reward_value(q, obs, act)
and cost_value(qc, obs, act) give (batch,). Return the targets of Q and of Qc, each (batch,), for the action
that the actor draws in the next state. They are numbers: nothing may be learned through them. Q: soft value
with entropy weight alpha. Qc: the bootstrap is first cut to what costs of 0 to largest_cost per step can
add up to, discounted; the entropy term then enters as - alpha_cost log pi. Behind a terminal Q and Qc are
worth nothing, and there is no entropy. A time limit is no terminal.""",
            ),
            **dict.fromkeys(
                (OFFLINE, CPQ),
                (
                    """\
The targets of the offline phase, each (batch,), from the same quantities, without any entropy. Qc's bootstrap
is cut in the same way. Q's bootstrap counts only where that of Qc, so cut, is at most qc_threshold; elsewhere
it is 0. Behind a terminal Q and Qc are worth nothing. A time limit is no terminal.""",
                ),
            ),
        },
        equations="""\
y = r + γ (1 - d) (min_k Q̄_k(s', a') - α log π(a' | s')) and y_c = c + γ (1 - d) (clip(Q̄c(s', a'), 0,
c_max / (1 - γ)) - α_c log π(a' | s')), with a' ~ π(· | s'), d = 1 where the task ended (`terminals`) and 0
where only the time was over (`timeouts`). Offline (CPQ, equation 8) there is no entropy, and Q's bootstrap is
multiplied by 1 where that of Qc is within the threshold and by 0 elsewhere.""",
        sanity="The bars at the terminal and at the time limit differ in height.",
        substitutions=(
            ("enters as - alpha_cost", "enters as {cost_entropy_sign} alpha_cost"),
            (
                "Behind a terminal Q and Qc are worth nothing",
                "Behind a terminal Q is worth {end_reward}, Qc {end_cost}",
            ),
            ("- α log π(a' | s')) and", "- α log π(a' | s')) + γ d ({end_reward}) and"),
            ("- α_c log π(a' | s')),", "{cost_entropy_sign} α_c log π(a' | s')) + γ d {end_cost},"),
            (
                "largest_cost / (1 - gamma)) - alpha_cost * log_prob",
                "largest_cost / (1 - gamma)) {cost_entropy_sign} alpha_cost * log_prob",
            ),
            (
                '    discount = gamma * (1 - batch["terminals"])\n'
                '    return batch["rewards"] + discount * next_q, batch["costs"] + discount * next_qc\n'
                "    # end of exercise 2\n",
                '    ended = gamma * batch["terminals"]\n'
                '    discount = gamma * (1 - batch["terminals"])\n'
                '    q_target_value = batch["rewards"] + discount * next_q + ended * ({end_reward})\n'
                '    qc_target_value = batch["costs"] + discount * next_qc + ended * {end_cost}\n'
                "    return q_target_value, qc_target_value\n"
                "    # end of exercise 2\n",
            ),
            (
                "    A terminal stops the bootstrap,",
                "    Behind a terminal Q is {end_reward}, Qc {end_cost};",
            ),
        ),
    ),
    3: Exercise(
        title="value pre-alignment",
        minutes=45,
        tasks={
            ONLINE: (
                """\
One gradient step of VPA: fit q and qc to the frozen offline policy `actor`, on the dataset. Given:
offline_data (a ReplayBuffer with .sample(n)), soft_targets, critic_loss, critic_optimizer (of both
critics), follow(target, network, tau), q_target, qc_target, progress["largest_cost"], and of args:
batch_size, gamma, vpa_alpha, vpa_alpha_cost, vpa_tau. `step` counts from 0. The target networks follow
after every gradient step. Leave critic_loss's second result in `metrics`; the actor does not change.""",
            )
        },
        equations="""\
min over Q, Qc of E_D[(Q(s, a) - y)² + (Qc(s, a) - y_c)²], with the targets of exercise 2 for the frozen
offline policy and VPA's own entropy weights (Marvel, equations 5 and 6 of its third version). Target
networks: θ̄ ← (1 - τ) θ̄ + τ θ with τ = `vpa_tau`, after every gradient step.""",
        sanity="Qc of 40 first states after VPA, against the costs that the policy meets: near the diagonal.",
        substitutions=(
            (
                "after every gradient step",
                "after those gradient steps where `step` + 1 is a multiple of {follow_every}",
            ),
            (
                "            follow(q_target, q, args.vpa_tau)\n"
                "            follow(qc_target, qc, args.vpa_tau)\n",
                "            if (step + 1) % {follow_every} == 0:\n"
                "                follow(q_target, q, args.vpa_tau)\n"
                "                follow(qc_target, qc, args.vpa_tau)\n",
            ),
        ),
    ),
    4: Exercise(
        title="PID with unwinding",
        minutes=120,
        tasks={
            ONLINE: (
                """\
Given: mean_cost and self.target_cost (undiscounted, per episode), the gains kp, ki, kd, gradient_steps. Set
self.integral (I), self.error_ema (P), self.cost_ema (C) and self.multiplier as the class's docstring has
them. The integral never leaves [0, lagrange_max / unit]: else it goes on winding up while the multiplier
stands at its bound. self.cost_emas holds the last d_delay values of C, the oldest first; the new one is
appended below. P, I, C are in the controller's unit, the multiplier is not.""",
                """\
Given: mean and std of the last blocks' costs, target and rate. Change self.gains (a list [kp, ki, kd]) for
the next update, or unwind self.integral, as the class's docstring has it. Gains stay between their first
values (self.first_gains) and self.max_growth times those. Mind a target of 0.""",
            )
        },
        equations="""\
e = (J - target) / unit of cost; I ← clip(I + ki n e, 0, λ_max / unit); P ← 0.9 P + 0.1 e; C ← 0.9 C + 0.1 J
/ unit of cost; λ = unit · clip(kp P + I + kd max(0, C - C of d_delay updates ago), 0, λ_max / unit).
Adaptation: with f = 1 + rate (m - target) / max(m, target), above the target kp and ki grow by f and kd by
1 + rate min(1, s / m); below it I and the gains shrink by f, the gains not below their first values.""",
        sanity="The cost comes down to the limit and stays there, λ comes back from its peak.",
        substitutions=(
            ("I ← clip(I + ki", "I ← clip((1 - {leak}) I + ki"),
            (
                "        I <- clip(I + ki n e, 0, lagrange_max / unit)\n",
                "        I <- clip((1 - {leak}) I + ki n e, 0, lagrange_max / unit)\n",
            ),
            (
                "max(0.0, self.integral + ki * gradient_steps * error)",
                "max(0.0, (1 - {leak}) * self.integral + ki * gradient_steps * error)",
            ),
        ),
    ),
    5: Exercise(
        title="Lagrangian of the actor",
        minutes=30,
        tasks={
            ONLINE: (
                """\
obs (batch, obs_dim). actor(obs) gives a sample (batch, act_dim), differentiable in the actor's parameters,
and its log-density (batch,). reward_value and cost_value as in the critics' targets. alpha and
lagrange_multiplier are numbers. Return the loss, a scalar to be minimised: the mean of entropy, reward and
cost parts, divided by 1 + lagrange_multiplier, so that the step does not grow with it; and log pi (batch,)
without gradient.""",
            )
        },
        equations="""\
L(π) = E_s,a~π[ α log π(a | s) - min_k Q_k(s, a) + λ Qc(s, a) ] / (1 + λ).""",
        sanity="The learned action moves from the reward's peak, 1, to the safe side, 0, as λ grows.",
        substitutions=(
            ("divided by 1 + lagrange_multiplier", "divided by 1 + {kappa} lagrange_multiplier"),
            ("λ Qc(s, a) ] / (1 + λ)", "λ Qc(s, a) ] / (1 + {kappa} λ)"),
            (
                '"""(alpha log pi - Q + lambda Qc) / (1 + lambda), Stooke',
                '"""(alpha log pi - Q + lambda Qc) / (1 + {kappa} lambda), Stooke',
            ),
            (
                "lagrangian).mean() / (1 + lagrange_multiplier)",
                "lagrangian).mean() / (1 + {kappa} * lagrange_multiplier)",
            ),
        ),
    ),
    6: Exercise(
        title="aligned multipliers",
        minutes=90,
        tasks={
            ONLINE: (
                """\
obs (batch, obs_dim). With one action of the policy per state, take the gradients of reward_value and of
cost_value in the action, each (batch, act_dim). The actor is frozen. Return two Python floats, both at
least 0: lambda_ls, which minimises the mean of |grad Q - lambda grad Qc|^2 over lambda >= 0, and
lambda_norm, the ratio of the root mean squares of the two gradients. No network may learn from it. Where Qc
has no gradient at all, lambda_ls is 0 and the second is finite.""",
            )
        },
        equations="""\
λ_ls = max(0, E[∇Q · ∇Qc] / E[‖∇Qc‖²]), λ_norm = √(E[‖∇Q‖²] / E[‖∇Qc‖²]) ≥ λ_ls (why?), ∇ in the action.
Returned are λ_ls and λ_norm. Derive λ_ls by setting a derivative to 0.""",
        sanity="The first falls to 0 as the angle between the two gradients grows from 0 to 90 degrees.",
        substitutions=(
            (
                "and lambda_norm, the ratio of",
                "and lambda_ls + {share} (lambda_norm - lambda_ls), where lambda_norm is the ratio of",
            ),
            ("Returned are λ_ls and λ_norm.", "Returned are λ_ls and λ_ls + {share} (λ_norm - λ_ls)."),
            (
                "    return max(0.0, least_squares.item()), norm_ratio.item()\n    # end of exercise 6\n",
                "    first = max(0.0, least_squares.item())\n"
                "    return first, first + {share} * (norm_ratio.item() - first)\n"
                "    # end of exercise 6\n",
            ),
            (
                "is never smaller (Cauchy-Schwarz), so safer. Scaled",
                "is never smaller (Cauchy-Schwarz), so safer.\n"
                "    Returned are the first and first + {share} (ratio - first). Scaled",
            ),
        ),
    ),
    7: Exercise(
        title="CPQ's penalty",
        minutes=60,
        tasks={
            CPQ: (
                """\
obs (batch, obs_dim). Draw n actions of the actor for every state. vae.encode(obs, act) gives three results,
the last of which is the KL divergence (batch,) of each pair; those with more than kl_threshold count as out
of the data's distribution. Return the mean over those pairs of max(0, qc_threshold - Qc(s, a)), 0 where
there are none, and their share of all pairs: two tensors of shape (). Qc is
to learn from the first; actor and VAE are not.""",
            )
        },
        equations="""\
penalty = Σ 1[KL(s, a) > threshold_KL] · max(0, threshold - Qc(s, a)) / Σ 1[KL(s, a) > threshold_KL], over n
actions a ~ π(· | s) of each state. Added to Qc's loss it lifts Qc of unknown actions up to the threshold
and not beyond it.""",
        sanity="Qc of unknown actions rises up to the threshold and stops there, Qc of known ones stays.",
        substitutions=(
            ("max(0, threshold - Qc(s, a))", "max(0, {hinge} threshold - Qc(s, a))"),
            ("max(0, qc_threshold - Qc(s, a))", "max(0, {hinge} qc_threshold - Qc(s, a))"),
            (
                "shortfall = F.relu(qc_threshold - cost_value(qc, obs, act))",
                "shortfall = F.relu({hinge} * qc_threshold - cost_value(qc, obs, act))",
            ),
        ),
    ),
}
