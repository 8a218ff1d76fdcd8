// What errors say of a launch: which kernel it was, and what it asked for.
#pragma once
#include <cstddef>
#include <string>

namespace omnimamba {

// A kernel as source code names it, in what the compiler calls a function of a template with argument KERNEL. GCC: "... [with
// auto KERNEL = omnimamba::{anonymous}::norm_kernel<float, 4>]"; clang: "[KERNEL = &omnimamba::(anonymous namespace)::...]";
// nvcc: "... KERNEL = omnimamba::_GLOBAL__N__1f2e_7_cuda_cu::...". What stands in an unnamed namespace is found without it.
inline std::string kernel_in(const std::string& pretty) {
  const std::string key = "KERNEL = ";
  const std::size_t begin = pretty.find(key) + key.size();
  std::size_t end = begin;
  for (int depth = 0; end < pretty.size() && !(depth == 0 && (pretty[end] == ';' || pretty[end] == ']')); end++)
    depth += (pretty[end] == '<' || pretty[end] == '(') - (pretty[end] == '>' || pretty[end] == ')');
  std::string found = pretty.substr(begin, end - begin);
  const auto drop = [&](const std::string& first, const std::string& last) {
    for (std::size_t at = found.find(first); at != std::string::npos; at = found.find(first))
      found.erase(at, found.find(last, at) + last.size() - at);
  };
  drop("{anonymous}", "::");
  drop("(anonymous namespace)", "::");
  drop("_GLOBAL__N__", "::");
  drop("&", "&");
  return found;
}

// `shared`: bytes beyond what the kernel declares; `cluster`: blocks that run together.
inline std::string launch_of(const std::string& kernel, const unsigned (&blocks)[3], unsigned threads,
                             std::size_t shared, unsigned cluster) {
  const std::string grid =
      std::to_string(blocks[0]) + " x " + std::to_string(blocks[1]) + " x " + std::to_string(blocks[2]);
  return "launch of " + kernel + ", " + grid + " blocks of " + std::to_string(threads) + " threads and " +
         std::to_string(shared) + " bytes of shared memory" +
         (cluster > 1 ? ", in clusters of " + std::to_string(cluster) : "");
}

}  // namespace omnimamba
