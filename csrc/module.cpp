// The name under which Python finds the bindings. Only this differs from one instruction set's module to the next; the
// bindings are compiled once.
#include <Python.h>

#define PASTE(a, b) a##b
#define INIT(name) PASTE(PyInit_, name)

extern "C" {
__attribute__((visibility("hidden"))) PyObject* PyInit_bindings();
__attribute__((visibility("default"))) PyObject* INIT(OMNIMAMBA_MODULE)() { return PyInit_bindings(); }
}
