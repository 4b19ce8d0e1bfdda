// What kernels.py launches on a GPU. Each kernel is one launch where the function of the same name in ops.py,
// packing.py, attention.py, loss.py or optimizer.py takes several; the derivations stand there.
// REAL is float or double; kernels.py compiles both. Arrays are contiguous, rows first. A warp is 32 threads in step.

typedef long long int64;
typedef unsigned long long uint64;

const int WARP = 32;
const int ROWS = 4;       // rows of a block, one a warp, where a kernel goes row by row
const int STRIPES = 16;   // rows that a block of column_sums reads at a time
const int THREADS = 256;  // of a block of cross_entropy

__device__ REAL warp_sum(REAL x) {
    for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

__device__ REAL warp_max(REAL x) {
    for (int offset = WARP / 2; offset; offset /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

__device__ int64 my_row() { return (int64)blockIdx.x * ROWS + threadIdx.x / WARP; }

__device__ int64 my_number() { return (int64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ int64 integer(const void* x, int64 wide, int64 i) {
    return wide ? ((const int64*)x)[i] : ((const int*)x)[i];
}

// ops.py

extern "C" __global__ void layer_norm(const REAL* x, const REAL* gamma, const REAL* beta, REAL* out, REAL* normed,
                                      REAL* sigma, int64 n, int64 d, double eps) {
    int64 row = my_row();
    int lane = threadIdx.x % WARP;
    if (row >= n) return;
    x += row * d, out += row * d, normed += row * d;
    REAL sum = 0, squares = 0;
    for (int64 j = lane; j < d; j += WARP) sum += x[j];
    REAL mean = warp_sum(sum) / d;
    for (int64 j = lane; j < d; j += WARP) squares += (x[j] - mean) * (x[j] - mean);
    REAL s = sqrt(warp_sum(squares) / d + (REAL)eps);
    for (int64 j = lane; j < d; j += WARP) {
        normed[j] = (x[j] - mean) / s;
        out[j] = normed[j] * gamma[j] + beta[j];
    }
    if (lane == 0) sigma[row] = s;
}

extern "C" __global__ void layer_norm_backward(const REAL* d_out, const REAL* normed, const REAL* sigma,
                                               const REAL* gamma, REAL* d_x, int64 n, int64 d) {
    int64 row = my_row();
    int lane = threadIdx.x % WARP;
    if (row >= n) return;
    d_out += row * d, normed += row * d, d_x += row * d;
    REAL sum = 0, along = 0;  // of e = gamma d_out, and of e n
    for (int64 j = lane; j < d; j += WARP) {
        REAL e = d_out[j] * gamma[j];
        sum += e;
        along += e * normed[j];
    }
    sum = warp_sum(sum) / d;
    along = warp_sum(along) / d;
    for (int64 j = lane; j < d; j += WARP) d_x[j] = (d_out[j] * gamma[j] - sum - normed[j] * along) / sigma[row];
}

// sum_x[j] += sum_i x[i, j], and sum_xy[j] += sum_i x[i, j] y[i, j] where y is not null.
// Blocks (column / 32, part): each sums its part of the rows. The last to finish adds up the parts, always in the same
// order, so that the sum is the same at each run.
const int MOST_TILES = 1024;
__device__ unsigned int finished[MOST_TILES];

extern "C" __global__ void column_sums(const REAL* x, const REAL* y, REAL* sum_x, REAL* sum_xy, REAL* parts, int64 n,
                                       int64 d) {
    __shared__ REAL all[2][STRIPES][WARP];
    __shared__ bool is_last;
    int64 column = (int64)blockIdx.x * WARP + threadIdx.x;
    int64 size = (n + gridDim.y - 1) / gridDim.y, first = blockIdx.y * size, stop = min(n, first + size);
    REAL a = 0, b = 0;
    if (column < d)
        for (int64 i = first + threadIdx.y; i < stop; i += STRIPES) {
            REAL value = x[i * d + column];
            a += value;
            if (y) b += value * y[i * d + column];
        }
    all[0][threadIdx.y][threadIdx.x] = a;
    all[1][threadIdx.y][threadIdx.x] = b;
    __syncthreads();
    if (threadIdx.y == 0 && column < d) {
        for (int k = 1; k < STRIPES; k++) a += all[0][k][threadIdx.x], b += all[1][k][threadIdx.x];
        parts[2 * blockIdx.y * d + column] = a;
        parts[(2 * blockIdx.y + 1) * d + column] = b;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) is_last = atomicAdd(&finished[blockIdx.x], 1u) == gridDim.y - 1;
    __syncthreads();
    if (!is_last) return;
    if (threadIdx.y == 0 && column < d) {
        const volatile REAL* done = parts;
        a = 0, b = 0;
        for (int64 k = 0; k < gridDim.y; k++) a += done[2 * k * d + column], b += done[(2 * k + 1) * d + column];
        sum_x[column] += a;
        if (y) sum_xy[column] += b;
    }
    if (threadIdx.x == 0 && threadIdx.y == 0) finished[blockIdx.x] = 0;
}

// Random words by counter (Salmon et al. 2011, Philox 4x32-10): words 4t..4t+3 of a stream depend on its seed and t alone.
__device__ void philox(uint64 seed, uint64 t, unsigned int word[4]) {
    unsigned int key0 = (unsigned int)seed, key1 = (unsigned int)(seed >> 32);
    word[0] = (unsigned int)t, word[1] = (unsigned int)(t >> 32), word[2] = 0, word[3] = 0;
    for (int round = 0; round < 10; round++) {
        uint64 a = (uint64)0xD2511F53u * word[0], b = (uint64)0xCD9E8D57u * word[2];
        word[0] = (unsigned int)(b >> 32) ^ word[1] ^ key0, word[1] = (unsigned int)b;
        word[2] = (unsigned int)(a >> 32) ^ word[3] ^ key1, word[3] = (unsigned int)a;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

extern "C" __global__ void random_uint16(unsigned short* out, int64 n, int64 seed, int64 offset) {
    int64 t = my_number();
    unsigned int word[4];
    philox(seed, offset + t, word);
    for (int64 i = 8 * t; i < min(n, 8 * t + 8); i++) out[i] = word[i % 8 / 2] >> (i % 2 * 16);
}

// mask, and out = x * mask where x is not null
extern "C" __global__ void dropout(const REAL* x, REAL* out, REAL* mask, int64 n, int64 threshold, double scale,
                                   int64 seed, int64 offset) {
    int64 t = my_number();
    unsigned int word[4];
    philox(seed, offset + t, word);
    for (int64 i = 8 * t; i < min(n, 8 * t + 8); i++) {
        int64 draw = (word[i % 8 / 2] >> (i % 2 * 16)) & 0xffff;
        mask[i] = draw >= threshold ? (REAL)scale : 0;
        if (x) out[i] = x[i] * mask[i];
    }
}

// packing.py: `filled` ascends, null where row p is at place p

extern "C" __global__ void to_heads(const REAL* x, const void* filled, int64 wide, REAL* out, int64 start, int64 n,
                                    int64 count, int64 length, int64 n_heads, int64 k) {
    int64 i = my_number();  // of [count, n_heads, length, k]
    if (i >= count * n_heads * length * k) return;
    int64 column = i % k, position = i / k % length, head = i / k / length % n_heads, b = i / k / length / n_heads;
    int64 place = b * length + position, row = place;
    if (filled) {
        row = 0;
        for (int64 stop = n; row < stop;) {  // the first row whose place is not before this one
            int64 middle = (row + stop) / 2;
            if (integer(filled, wide, middle) < place) row = middle + 1;
            else stop = middle;
        }
        if (row == n || integer(filled, wide, row) != place) row = -1;
    }
    out[i] = row < 0 ? 0 : x[((start + row) * n_heads + head) * k + column];
}

extern "C" __global__ void from_heads(const REAL* x, const void* filled, int64 wide, REAL* out, int64 start, int64 n,
                                      int64 length, int64 n_heads, int64 k) {
    int64 i = my_number();  // of [n, n_heads, k]
    if (i >= n * n_heads * k) return;
    int64 column = i % k, head = i / k % n_heads, row = i / k / n_heads;
    int64 place = filled ? integer(filled, wide, row) : row;
    out[start * n_heads * k + i] = x[((place / length * n_heads + head) * length + place % length) * k + column];
}

// attention.py

extern "C" __global__ void softmax(REAL* scores, const REAL* mask, int64 mask_stride, int64 n, int64 length) {
    int64 row = my_row();
    int lane = threadIdx.x % WARP;
    if (row >= n) return;
    scores += row * length, mask += row % length * mask_stride;
    REAL highest = scores[0] + mask[0], sum = 0;
    for (int64 j = lane; j < length; j += WARP) highest = max(highest, scores[j] + mask[j]);
    highest = warp_max(highest);
    for (int64 j = lane; j < length; j += WARP) {
        scores[j] = exp(scores[j] + mask[j] - highest);
        sum += scores[j];
    }
    sum = warp_sum(sum);
    for (int64 j = lane; j < length; j += WARP) scores[j] /= sum;
}

// Here r is summed from d_A' and A', as in the derivation, not from d_mixed and mixed: both are at hand in this row.
extern "C" __global__ void softmax_backward(REAL* d_weights, const REAL* weights, const REAL* dropped, int64 n,
                                            int64 length) {
    int64 row = my_row();
    int lane = threadIdx.x % WARP;
    if (row >= n) return;
    d_weights += row * length, weights += row * length, dropped += row * length;
    REAL r = 0;
    for (int64 j = lane; j < length; j += WARP) {
        d_weights[j] *= dropped[j];
        r += d_weights[j];
    }
    r = warp_sum(r);
    for (int64 j = lane; j < length; j += WARP) d_weights[j] -= weights[j] * r;
}

// loss.py: one block a row. Writes scale (p - onehot) over the logits and the row's loss to `losses`.
extern "C" __global__ void cross_entropy(REAL* logits, const void* targets, int64 wide, REAL* losses, int64 n_items,
                                         double scale) {
    __shared__ REAL highest[THREADS / WARP], sums[THREADS / WARP];
    REAL* z = logits + (int64)blockIdx.x * n_items;
    int64 target = integer(targets, wide, blockIdx.x);
    REAL z_target = z[target], m = z[0], s = 0;
    for (int64 j = threadIdx.x; j < n_items; j += THREADS) m = max(m, z[j]);
    m = warp_max(m);
    if (threadIdx.x % WARP == 0) highest[threadIdx.x / WARP] = m;
    __syncthreads();
    for (int k = 0; k < THREADS / WARP; k++) m = max(m, highest[k]);
    for (int64 j = threadIdx.x; j < n_items; j += THREADS) {
        REAL e = exp(z[j] - m);
        s += e;
        z[j] = e;
    }
    s = warp_sum(s);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = s;
    __syncthreads();
    s = 0;
    for (int k = 0; k < THREADS / WARP; k++) s += sums[k];
    REAL factor = (REAL)scale / s;
    for (int64 j = threadIdx.x; j < n_items; j += THREADS) z[j] = (z[j] - (j == target ? s : 0)) * factor;
    if (threadIdx.x == 0) losses[blockIdx.x] = (log(s) - (z_target - m)) * (REAL)scale;
}

// optimizer.py

extern "C" __global__ void adam_step(REAL* w, const REAL* g, REAL* m, REAL* v, int64 n, double new_m, double new_v,
                                     double v_factor, double eps, double rate) {
    int64 i = my_number();
    if (i >= n) return;
    m[i] += (REAL)new_m * (g[i] - m[i]);
    v[i] += (REAL)new_v * (g[i] * g[i] - v[i]);
    w[i] -= m[i] / (sqrt(v[i]) * (REAL)v_factor + (REAL)eps) * (REAL)rate;
}
