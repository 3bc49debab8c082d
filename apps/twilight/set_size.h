#ifndef TWILIGHT_APPS_SET_SIZE_H_
#define TWILIGHT_APPS_SET_SIZE_H_

#include <cstdint>
#include <span>
#include <vector>

namespace twilight::app {

/// What is planted for one query head on top of noise: tokens with raised logits, and a sink at
/// token 0 that holds a set share of the whole attention mass.
struct HeadPlan {
  std::vector<std::int32_t> heavy;  ///< tokens, not 0
  std::vector<float> profile;       ///< of `heavy`: the part of `boost` that each gets, up to 1
  double sink_share = 0;            ///< below 1
  double boost = 0;                 ///< added to the logit of profile 1
  double sink_logit = 0;            ///< added to the logit of token 0
  std::int32_t set_size = 0;        ///< tokens of the exact p-set, the sink among them
};

/// Bisects the boost until the exact p-set has `size` tokens (a stronger boost makes it smaller)
/// and fills in the plan's last three fields. `logits` [N] are those of the noise alone. The size
/// falls short where the wanted one cannot be had, e.g. because noise has less mass than 1 - p.
void calibrate(std::span<const float> logits, double p, std::int32_t size, HeadPlan& plan);

}  // namespace twilight::app

#endif  // TWILIGHT_APPS_SET_SIZE_H_
