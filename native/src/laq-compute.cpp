#include "laq-compute.h"

#include "laq-rows.h"

thread_local uint32_t laq_faults = 0;

static bool is_cpu(ggml_backend_t backend) {
    return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

laq_compute::laq_compute(ggml_backend_sched_t of_context, size_t max_nodes) :
    cpu(ggml_backend_dev_init(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), nullptr)), max_nodes(max_nodes) {
    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> types;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(of_context); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(of_context, i);
        types.push_back(ggml_backend_sched_get_buffer_type(of_context, backend));
        backends.push_back(is_cpu(backend) ? cpu.get() : backend);
    }
    if (cpu) {
        sched.reset(
            ggml_backend_sched_new(backends.data(), types.data(), (int) backends.size(), max_nodes, false, false));
    }
    if (!sched) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, "no memory for the scheduler of evictions");
    }
    meta.resize(ggml_tensor_overhead() * 2 * max_nodes + ggml_graph_overhead_custom(max_nodes, false));
}

void laq_compute::begin() {
    ggml_backend_sched_reset(sched.get());
    meta_ctx.reset(ggml_init({ meta.size(), meta.data(), true }));
    gf = ggml_new_graph_custom(ctx(), max_nodes, false);
}

void laq_compute::place(ggml_tensor * node, const ggml_tensor * beside) {
    const ggml_backend_dev_t dev = laq_device_of(beside->buffer);
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched.get(), i);
        if (ggml_backend_get_device(backend) == dev) {
            ggml_backend_sched_set_tensor_backend(sched.get(), node, backend);
            return;
        }
    }
}

void laq_compute::place_on_cpu(ggml_tensor * node) {
    ggml_backend_sched_set_tensor_backend(sched.get(), node, cpu.get());
}

void laq_compute::add(ggml_tensor * node, const ggml_tensor * beside) {
    place(node, beside);
    ggml_build_forward_expand(gf, node);
}

void laq_compute::reserve(const char * what) {
    if (!ggml_backend_sched_reserve(sched.get(), gf)) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, std::string("no memory for ") + what);
    }
}

void laq_compute::alloc(const char * what) {
    laq_fault();
    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        throw laq_error(LAQ_STATUS_NO_MEMORY, std::string("no memory for ") + what);
    }
}

void laq_set_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    if (auto * set =
            (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads")) {
        set(backend, n_threads);
    }
}

void laq_compute::run(int n_threads, const char * what) {
    laq_set_threads(cpu.get(), n_threads);
    if (ggml_backend_sched_graph_compute(sched.get(), gf) != GGML_STATUS_SUCCESS) {
        throw laq_error(LAQ_STATUS_COMPUTE_FAILED, what);
    }
}

uint64_t laq_compute::bytes() const {
    uint64_t res = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        res += ggml_backend_sched_get_buffer_size(sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    return res;
}
