"""The supernet of DARTS (arXiv 1806.09055, sections 2.1 and 2.2) in numpy, forward only, in float64.

It uses no operator of Paddle, so it also checks Paddle's operators. It shares no code with model_search.py or with
supernet.py in this folder. Weights are {name: array}, named as in the authors' code. Convolutions and pools are sums or
maxima over the taps of the kernel, each tap a shifted slice of the padded image.
"""
import numpy as np


def windows(x, size, stride, padding, dilation, fill):
    """Yields ((row, column), slice [N, C, H', W'] of the padded x [N, C, H, W]) for each tap of a square kernel."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=fill)
    reach = dilation * (size - 1)
    for i in range(size):
        for j in range(size):
            top, left = i * dilation, j * dilation
            yield (i, j), x[:, :, top:x.shape[2] - reach + top:stride, left:x.shape[3] - reach + left:stride]


def convolve(x, kernel, stride=1, padding=0):
    """Returns the convolution of x [N, C_in, H, W] with kernel [C_out, C_in, k, k]."""
    return sum(np.einsum('nchw,oc->nohw', window, kernel[:, :, i, j])
               for (i, j), window in windows(x, kernel.shape[2], stride, padding, 1, 0.0))


def convolve_depthwise(x, kernel, stride, dilation):
    """Returns the depthwise convolution with kernel [C, 1, k, k], padded so that stride 1 keeps height and width."""
    size = kernel.shape[2]
    return sum(window * kernel[:, 0, i, j].reshape(1, -1, 1, 1)
               for (i, j), window in windows(x, size, stride, dilation * (size // 2), dilation, 0.0))


def max_pool(x, stride):
    return np.max([window for _, window in windows(x, 3, stride, 1, 1, -np.inf)], axis=0)


def average_pool(x, stride):
    """Averages over 3 x 3 pixels without the padding: the result at a corner is the mean of 4 pixels."""
    count = sum(window for _, window in windows(np.ones_like(x), 3, stride, 1, 1, 0.0))
    return sum(window for _, window in windows(x, 3, stride, 1, 1, 0.0)) / count


def relu(x):
    return np.maximum(x, 0.0)


def forward(weights, alphas_normal, alphas_reduce, images, channels, layers, epsilon=1e-5):
    """Returns the logits [N, classes] of images [N, 3, H, W]; alphas [14, 8] are before the softmax.

    epsilon: of the batch normalisation. Paddle stores it in single precision: float(np.float32(1e-5)) reproduces that.
    """
    def batch_norm(x):
        centred = x - x.mean(axis=(0, 2, 3), keepdims=True)
        return centred / np.sqrt((centred ** 2).mean(axis=(0, 2, 3), keepdims=True) + epsilon)

    def factorized_reduce(x, name):
        x = relu(x)
        first = convolve(x, weights[name + '.conv_1.weight'], stride=2)
        second = convolve(x[:, :, 1:, 1:], weights[name + '.conv_2.weight'], stride=2)
        return batch_norm(np.concatenate([first, second], axis=1))

    def relu_conv_bn(x, name):
        return batch_norm(convolve(relu(x), weights[name + '.op.1.weight']))

    def separable(x, depthwise, pointwise, stride, dilation):
        x = convolve_depthwise(relu(x), weights[depthwise], stride, dilation)
        return batch_norm(convolve(x, weights[pointwise]))

    def sep_conv(x, name, stride):
        x = separable(x, name + '.op.1.weight', name + '.op.2.weight', stride, 1)
        return separable(x, name + '.op.5.weight', name + '.op.6.weight', 1, 1)

    def dil_conv(x, name, stride):
        return separable(x, name + '.op.1.weight', name + '.op.2.weight', stride, 2)

    def mixed(x, mixing, name, stride):
        """Returns the weighted sum of the operations of an edge; operation 0, none, has a weight and adds nothing."""
        return (mixing[1] * batch_norm(max_pool(x, stride))
                + mixing[2] * batch_norm(average_pool(x, stride))
                + mixing[3] * (x if stride == 1 else factorized_reduce(x, name + '.3'))
                + mixing[4] * sep_conv(x, name + '.4', stride) + mixing[5] * sep_conv(x, name + '.5', stride)
                + mixing[6] * dil_conv(x, name + '.6', stride) + mixing[7] * dil_conv(x, name + '.7', stride))

    def softmax(alpha):
        powers = np.exp(alpha - alpha.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    stem = batch_norm(convolve(images, weights['stem.0.weight'], padding=1))
    assert stem.shape[1] == 3 * channels
    stem = stem * weights['stem.1.weight'].reshape(1, -1, 1, 1) + weights['stem.1.bias'].reshape(1, -1, 1, 1)
    outputs = [stem, stem]
    reductions = {layers // 3, 2 * layers // 3}
    for i in range(layers):
        name = f'cells.{i}'
        s0, s1 = outputs[-2:]
        s0 = (factorized_reduce if i - 1 in reductions else relu_conv_bn)(s0, name + '.preprocess0')
        states = [s0, relu_conv_bn(s1, name + '.preprocess1')]
        mixing = softmax(alphas_reduce if i in reductions else alphas_normal)
        for first_edge in (0, 2, 5, 9):
            states.append(sum(mixed(state, mixing[first_edge + j], f'{name}._ops.{first_edge + j}._ops',
                                    2 if i in reductions and j < 2 else 1)
                              for j, state in enumerate(states)))
        outputs.append(np.concatenate(states[2:], axis=1))
    return outputs[-1].mean(axis=(2, 3)) @ weights['classifier.weight'].T + weights['classifier.bias']


def cross_entropy(logits, labels):
    """Returns the mean cross entropy of logits [N, classes]; labels: [N] or [N, 1]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_softmax[np.arange(len(logits)), np.ravel(labels)].mean()


def accuracies(logits, labels):
    """Returns (top-1, top-5) as fractions."""
    hits = np.argsort(-logits, axis=1, kind='stable') == np.reshape(labels, (-1, 1))
    return hits[:, :1].any(axis=1).mean(), hits[:, :5].any(axis=1).mean()
