// Contract of dynplan::encode_until_sure.
//
//   encode_until_sure(input_ids, ..., padding_idx?, packed_weights[L], num_heads, activation, eps, reads_first:
//       as encode_tokens,
//       chain[C]: depths at which samples may leave, rising within 1..L; none: nobody runs anything,
//       exits: weight (H, H) and bias (H,) for each of chain below L,
//       head: weight and bias of the model's own head, one linear map or two, head_activation between them,
//       sureness, measures, temperatures: what makes an answer sure (dynplan/policies/exits.py), and its tensors
//       and numbers for each of chain below L,
//       thresholds[N]: sureness to leave with at the budgets 0, 1/(N-1), ..., 1,
//       budget: share of layer work,
//       stream? int64 (5,), burst, sway: a StreamBudget's counts)
//     -> (B, S, H) float32 as encode_tokens, with what the exit gives in position 0 of samples that left;
//        keep bool (B, L)
//
// A whole forward of dynplan.policies.ConfidenceExit and its like: layers up to a depth, the mean of each
// sample's rows through the exit and the model's own head, and who goes on, within the contract of the batch or
// of the stream.
//
// CPU, float32 tables, inference.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "kernels/planning/exits.h"
#include "ops/encode_tokens.h"

namespace dynplan {

struct EncodeUntilSureCall {
  EncodeTokensCall encode;
  at::IntArrayRef chain;
  std::vector<kernels::LinearMap> exits, head, measures;
  at::ArrayRef<double> temperatures;
  kernels::HeadActivation head_activation;
  kernels::Sureness sureness;
  at::ArrayRef<double> thresholds;
  double budget;
  const std::optional<at::Tensor>& stream;
  double burst, sway;
};

struct ExitArguments {
  at::IntArrayRef chain;
  at::TensorList exits, head;
  std::string_view head_activation, sureness;
  at::TensorList measures;
  at::ArrayRef<double> temperatures;
  at::ArrayRef<double> thresholds;
  double budget;
  const std::optional<at::Tensor>& stream;
  double burst, sway;
};

EncodeUntilSureCall check_encode_until_sure(EncodeTokensCall encode, const ExitArguments& given);

}  // namespace dynplan
