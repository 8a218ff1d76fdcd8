// Runs the native kernels that it is asked for, in a process without Python: calls on stdin, answers on stdout.
//
//   call    name, threads, buffers, fields
//   fields  name, then of a view: buffer (or -1), offset, type, 4 strides; of a number: it as an integer and as a double
//   answer  error (empty where there is none), result, buffers
//
// Numbers are 8 bytes each, texts and buffers are preceded by their length. A buffer is the whole memory of one or more
// tensors; a view names it by number, and an offset in bytes. First comes a line for each kernel: name, whether it has a
// result.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "bindings.h"

void find_kernels(omnimamba::py::module_&);

namespace omnimamba {
namespace {

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the caller has gone
}
void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

int64_t read_number() {
  int64_t number;
  read(&number, sizeof number);
  return number;
}
void write_number(int64_t number) { write(&number, sizeof number); }

std::string read_text() {
  std::string text(static_cast<size_t>(read_number()), 0);
  read(text.data(), text.size());
  return text;
}

struct Buffer {
  explicit Buffer(size_t bytes) : bytes(bytes), data(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))) {}
  Buffer(Buffer&& other) : bytes(other.bytes), data(other.data) { other.data = nullptr; }
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  size_t bytes;
  char* data;
};

std::vector<Buffer>* buffers;
const Fields* fields;

template <class Number>
void put(void* member, Number value) {
  std::memcpy(member, &value, sizeof value);
}

void fill(void* params) {
  for (int64_t left = read_number(); left > 0; left--) {
    const std::string name = read_text();
    const Field& field = fields->at(name);
    void* member = static_cast<char*>(params) + field.place;
    if (field.kind == Kind::VIEW) {
      View view;
      const int64_t buffer = read_number(), offset = read_number();
      view.dtype = static_cast<DType>(read_number());
      for (int64_t& stride : view.stride) stride = read_number();
      if (buffer >= 0) view.data = (*buffers)[static_cast<size_t>(buffer)].data + offset;
      put(member, view);
      continue;
    }
    const int64_t whole = read_number();
    double real;
    read(&real, sizeof real);
    switch (field.kind) {
      case Kind::FLAG: put(member, static_cast<bool>(whole)); break;
      case Kind::INT: put(member, static_cast<int32_t>(whole)); break;
      case Kind::FLOAT: put(member, static_cast<float>(real)); break;
      default: put(member, whole);
    }
  }
}

void answer() {
  const Kernel& kernel = kernels().at(read_text());
  const int threads = static_cast<int>(read_number());
  std::vector<Buffer> mine;
  buffers = &mine;
  fields = kernel.fields;
  for (int64_t left = read_number(); left > 0; left--) {
    mine.emplace_back(static_cast<size_t>(read_number()));
    read(mine.back().data, mine.back().bytes);
  }
  std::string error;
  int64_t result = 0;
  try {
    result = kernel.run(kernel.function, threads, fill);
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  write_number(static_cast<int64_t>(error.size()));
  write(error.data(), error.size());
  write_number(result);
  for (const Buffer& buffer : mine) write(buffer.data, buffer.bytes);
  std::fflush(stdout);
}

}  // namespace
}  // namespace omnimamba

int main() {
  omnimamba::py::module_ module;
  find_kernels(module);
  for (const auto& [name, kernel] : omnimamba::kernels()) std::printf("%s %d\n", name.c_str(), kernel.has_result);
  std::printf("\n");
  std::fflush(stdout);
  for (;;) omnimamba::answer();
}
