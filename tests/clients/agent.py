"""An agent that plays a game of several turns, and learns at the end of each episode."""

import torch
from transformers import AutoTokenizer

import trl.assets
from tests.clients.weights import finite, same, weights
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


class Guessing:
    """The player is praised for words that it has not used yet."""

    def reset(self):
        self.seen, self.turn = set(), 0
        return "It was"

    def step(self, words):
        fresh = [word for word in words.split() if word not in self.seen]
        self.seen.update(fresh)
        self.turn += 1
        return " and then", float(len(fresh)), self.turn == 3


class Agent:
    """Keeps an episode's tokens, and which of them the model wrote."""

    def __init__(self, model, tokenizer, masked, **ppo):
        self.masked = masked
        self.tokenizer = tokenizer
        self.ppo_trainer = PPOTrainer(PPOConfig(**ppo), model, tokenizer=tokenizer)
        self.generate_kwargs = {"max_new_tokens": 4, "do_sample": True, "top_p": 1.0, "top_k": 0}

    def begin(self, observation):
        self.query = torch.tensor(self.tokenizer.encode(observation))
        self.written = torch.tensor([], dtype=torch.long)
        self.mask = torch.tensor([], dtype=torch.long)
        self.reward = 0.0

    def act(self):
        context = torch.cat([self.query, self.written])
        answer = self.ppo_trainer.generate(context, return_prompt=False, **self.generate_kwargs)[0]
        self._append(answer, by_model=1)
        return self.tokenizer.decode(answer)

    def observe(self, text, reward):
        self._append(torch.tensor(self.tokenizer.encode(text)), by_model=0)
        self.reward += reward

    def _append(self, tokens, by_model):
        self.written = torch.cat([self.written, tokens])
        self.mask = torch.cat([self.mask, torch.full_like(tokens, by_model)])

    def end(self):
        """One step of PPO on this episode; masked, without what the game wrote."""
        mask = self.mask if self.masked else torch.ones_like(self.mask)
        self.ppo_trainer.config.batch_size = self.ppo_trainer.config.mini_batch_size = 1
        return self.ppo_trainer.step([self.query], [self.written], [torch.tensor(self.reward)], response_masks=[mask])


def play(masked):
    """The weights after two episodes."""
    torch.manual_seed(0)
    name = trl.assets.path("tiny-gpt2-reviews")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(name)
    before = weights(model)
    agent = Agent(model, tokenizer, masked, learning_rate=1e-3, batch_size=16, mini_batch_size=4)
    game = Guessing()
    for _ in range(2):
        agent.begin(game.reset())
        done = False
        while not done:
            observation, reward, done = game.step(agent.act())
            agent.observe(observation, reward)
        stats = agent.end()
        assert 0 < int(agent.mask.sum()) <= 12 < len(agent.mask)
    assert not same(before, weights(model))
    finite(stats, "objective/kl", "ppo/loss/total", "ppo/mean_scores")
    assert stats["tokens/responses_len_mean"] == len(agent.written)
    return weights(model)


def main():
    assert same(play(masked=True), play(masked=True))
    assert not same(play(masked=True), play(masked=False))


if __name__ == "__main__":
    main()
