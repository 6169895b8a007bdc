"""The Chinese terms of the tables in README.md. English phrases without an entry remain."""
from __future__ import annotations

import re

# Headings and phrases. Longer texts are taken apart at commas and colons.
TERMS = {
    'step': '一步', 'this project': '本项目', 'ratio of times': '耗时之比', 'ratio of memory': '峰值内存之比',
    'peak memory': '峰值内存', 'ratio': '比值', 'time': '耗时', 'unit': '单位', 'measured': '测量内容', 'peer': '对照',
    'peer is': '对照为', 'alone': '单独运行', 'with a busy process': '另有一个占满 CPU 的进程', 's': 's',
    'first-order DARTS': '一阶 DARTS', 'arithmetic': '运算量', 'time at the matrix rate': '按矩阵乘速率所需时间',
    'share of the matrix rate': '达到矩阵乘速率的比例', '% of time': '占耗时的百分比', 'ready': '就绪',
    'operators': '算子数', 'start': '启动', 'matrix rate': '矩阵乘速率', 'images/s': '张图像/s',
    'one pass': '一次前向反向', 'edge by edge': '逐边', 'contiguous': '连续布局', 'channels last': 'channels last 布局',
    'search': '搜索', 'training': '训练', 'second order': '二阶', 'first order': '一阶',
    'pad': '填充', 'depthwise': 'depthwise 卷积', 'pointwise': 'pointwise 卷积', 'normalisation': '归一化',
    'pools': '池化', 'sums': '求和', 'waiting': '等待', 'other': '其他', 'host': '主机端',
    "Paddle's own operators": 'Paddle 自带算子',
    'method': '方法', 'flags': '参数', 'searches': '搜索次数', 'training images seen': '看过的训练图像数',
    'images seen by alpha': 'α 看过的图像数', 'seconds': '秒', 'group': '组', 'genotype': 'genotype',
    'genotypes': 'genotype', 'seed': '种子', 'test top-1': '测试 top-1', 'top-1': 'top-1', 'weights': '参数量',
    'multiply-adds': '乘加', 'mean': '均值', 'standard deviation': '标准差',
    '95 % interval of the mean': '均值的 95% 区间', 'lowest': '最低', 'highest': '最高', 'test': '检验',
    'difference': '差', '95 % interval': '95% 区间', 'points': '百分点', "Welch's": 'Welch 检验', 'paired': '配对检验',
    'top-1 with': 'top-1 与', 'number of weights': '参数量', 'all': '全部', 'random': '随机', 'published': '已发表',
    'random-of-size': '随机（参数量相同）', 'searched': '搜索得到（合计）', 'degrees of freedom': '自由度',
    'a correlation needs at least three genotypes that differ': '至少需要三个不同的 genotype',
    'supernet loss': '超网损失', 'supernet top-1': '超网 top-1', 'log alpha': 'log α', 'unknown': '未知',
}
# Phrases with a number or a name.
PATTERNS = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r'(\d+) cells', r'\1 个单元'), (r'(\d+) cores?', r'\1 核'), (r'batch (\d+)', r'批大小 \1'),
    (r'(\d+) epochs', r'\1 个 epoch'), (r'(\d+) genotypes', r'\1 个 genotype'),
    (r'(\d+) training seeds', r'\1 个训练种子'),
    (r'(\d+) pairs', r'\1 对'), (r'(\d+) and (\d+)', r'\1 和 \2'), (r'([\d.-]+) to ([\d.-]+)', r'\1 至 \2'),
    (r'median of (\d+) rounds \(lowest–highest\)', r'\1 轮的中位数（最低–最高）'),
    (r'load ([\d.]+) at the start', r'开始时负载 \1'), (r'commit (\w+)', r'提交 \1'),
    (r'commit (\w+) with changes', r'提交 \1（有改动）'), (r'product of (\d+) x (\d+)', r'\1 × \2 矩阵相乘'),
    (r'training seeds of a genotype', '同一 genotype 的训练种子'), (r'pooled over (\d+)', r'合并 \1 个'),
    (r'training seeds of ([\w.-]+)', r'\1 的训练种子'), (r'mean of ([\w.-]+)', r'\1 的均值'))]
UNITS = '%', 's', 'M', 'GB', 'GFLOP', 'points', '% of time'
SEPARATORS = (('; ', '；'), (': ', '：'), (', ', '，'), (' − ', ' − '))


def chinese(text: str) -> str:
    """Returns a text of a table in Chinese: a known term or pattern, or its parts between separators."""
    if text in TERMS:
        return TERMS[text]
    for pattern, replacement in PATTERNS:
        if pattern.fullmatch(text):
            return pattern.sub(replacement, text)
    group, unit = re.fullmatch(r'genotypes of ([\w-]+)', text), re.fullmatch(f'(.+), ({"|".join(UNITS)})', text)
    if group:
        return f'{chinese(group[1])} 的 genotype'
    if unit:
        return f'{chinese(unit[1])}（{chinese(unit[2])}）'
    for separator, joined in SEPARATORS:
        if separator in text and not text.startswith('`'):
            return joined.join(map(chinese, text.split(separator)))
    return text
