"""Titles and captions of the experiments' figures and the words in their charts and tables, in English and Japanese."""

TITLES = {
    "degradation": ("Deeper plain networks get worse", "深い plain ネットワークは性能が落ちる"),
    "gradients": ("What reaches the first layer", "最初の層に届く勾配"),
    "lesion": ("Removing blocks from a trained network", "学習後にブロックを取り除く"),
    "response": ("How close blocks are to the identity", "ブロックは恒等写像にどれだけ近いか"),
    "memory": ("What depth costs", "深さの代償"),
    "landscape": ("The loss around a trained network", "学習後の損失地形"),
    "curvature": ("How sharp the loss becomes", "損失はどこまで鋭くなるか"),
    "regularisation": ("Regularisers on a small set", "少ないデータと正則化"),
    "relatives": ("The relatives", "親戚たち"),
}

CAPTIONS = {
    "degradation": (
        "Networks of the same depth and the same number of parameters, with the same recipe. Without shortcuts the deep ones "
        "have a higher error on the training images themselves: this is not overfitting, they are harder to optimise. With "
        "shortcuts a block that is not needed can stay near the identity, so that depth need not harm the training; what it did "
        "here to training and to test error, the table says.",
        "深さもパラメータ数も学習条件も同じネットワークの比較。ショートカットがないと、深いほど訓練画像に対する誤差そのものが"
        "高くなる。過学習ではなく、最適化が難しいのである。ショートカットがあれば、不要なブロックは恒等写像の近くに"
        "とどまれるので、深さが学習の害になるとは限らない。ここで訓練誤差とテスト誤差がどうなったかは表に示す。",
    ),
    "gradients": (
        "The norm of the loss's gradient at the output of each block, before training. In a plain network without norms every "
        "layer multiplies it: with LeCun's variance it vanishes towards the first layer, with twice He's it explodes. Batch "
        "normalisation removes the dependence on the initial scale, and the lines of the three scales fall onto one; it does "
        "not remove that on the depth: in a plain network each block still multiplies the gradient by a factor above 1. The "
        "shortcut does that: it passes the gradient on unchanged around every branch. The Jacobian of a block is that of its "
        "branch plus the identity, which is checked numerically here. Without another word a network has batch norm.",
        "学習前に、各ブロックの出力における損失の勾配の大きさを測った。正規化のない plain ネットワークでは層ごとに倍率が"
        "かかり、LeCun の分散では最初の層に向かって消え、He の 2 倍の分散では爆発する。バッチ正規化は初期値の大きさへの依存を"
        "取り除き、三つの大きさの線は一本に重なる。しかし深さへの依存は取り除かない。plain ネットワークでは一つのブロックごとに、"
        "勾配に 1 より大きい倍率がかかり続ける。それを取り除くのはショートカットで、どの枝も迂回して勾配をそのまま伝える。"
        "ブロックのヤコビ行列は枝のヤコビ行列に単位行列を足したものであり、ここで数値的にも確かめている。特に断りのない"
        "ネットワークにはバッチ正規化がある。",
    ),
    "lesion": (
        "Blocks are taken out of a trained network, or change places, with nothing trained again. The residual network loses "
        "little with each: its many paths of different lengths work in parallel. In a plain network there is only one path, "
        "and a single missing block breaks it. The first block of the second and of the third stage changes the size of what "
        "it is given, so that nothing can take its place: these two are not removed, and leave a gap. Bars are standard "
        "deviations over seeds and random choices.",
        "学習済みのネットワークから、再学習なしにブロックを取り除いたり入れ替えたりする。残差ネットワークでは長さの異なる多数の"
        "経路が並列に働くため、一つ失っても影響は小さい。plain ネットワークの経路は一本しかなく、一つ欠けると壊れる。第 2 段と"
        "第 3 段の最初のブロックは入力の形を変えるので、代わりがない。この二つは取り除かず、図では空けてある。縦棒はシードと"
        "無作為な選択にわたる標準偏差である。",
    ),
    "response": (
        "The standard deviation of what each branch adds, and its ratio to that of the block's input. The deeper the network, the "
        "less a block changes its input on average: blocks refine what is there.",
        "各ブロックの枝が加える量の標準偏差と、入力に対するその比。平均して見れば、ネットワークが深いほど"
        "一つのブロックの変化は小さい。ブロックは受け取ったものを少しずつ磨き上げている。",
    ),
    "memory": (
        "What a compiled training step needs besides the state. Keeping all activations costs memory in proportion to the "
        "depth; computing blocks twice, again in the backward pass, saves memory and costs time. With equal blocks in a loop the "
        "time to compile hardly depends on the depth.",
        "コンパイル済みの学習 1 ステップに、状態とは別に必要なメモリ。すべての活性を残すと深さに比例して増える。逆伝播の際に"
        "ブロックを計算し直せば、時間と引き換えに減らせる。同じ形のブロックをループにすれば、コンパイル時間は深さにほとんど"
        "よらない。",
    ),
    "landscape": (
        "The loss on a plane through the trained network, spanned by two random directions whose filters are scaled to those of "
        "the network. Batch norms take the statistics of the batch at every point. Compare how wide and how smooth the valleys "
        "are: at twenty layers they hardly differ; with more layers plain networks no longer find a valley at all.",
        "学習済みのネットワークを通り、フィルタの大きさを揃えた二つの乱数方向が張る平面上の損失。バッチ正規化は各点でバッチの"
        "統計量を使う。谷の広さとなめらかさを比べてほしい。二十層ではほとんど差がない。plain との違いは深さとともに現れ、"
        "深い plain ネットワークは谷そのものを見つけられなくなる。",
    ),
    "curvature": (
        "The Hessian of the training loss along gradient descent, every step on all of 256 images, in narrow networks with "
        "smooth activations (SiLU) and squared error. The largest eigenvalue is called the sharpness. On a quadratic, steps "
        "of size r diverge as soon as it exceeds 2 / r. Cohen et al. (2021) found that networks sharpen until about there, and "
        "then train on at that edge of stability, with a loss that no longer falls at every step. A curve may reach "
        "its line from below or from above; one that ends below has not reached it in these few steps. "
        "Eigenvalues are those of Lanczos' method, with all basis vectors kept orthogonal; the trace is a mean over a few "
        "random vectors, and its bars are standard errors. With batch norm the statistics are those of the batch, and the "
        "learning rates are larger, so that the edge lies within reach of a short training. Dashed lines belong to the smaller "
        "learning rate; loss, trace and the other eigenvalues are those at the larger one.",
        "勾配降下法に沿って測った訓練損失のヘッセ行列。毎ステップ 256 枚の画像すべてを使い、なめらかな活性化関数 (SiLU) をもつ細い"
        "ネットワークを二乗誤差で学習した。最大の固有値を鋭さと呼ぶ。二次関数なら、鋭さが 2 / r を超えると大きさ r のステップは"
        "発散する。Cohen ら (2021) によれば、ネットワークはおよそそこまで鋭くなり、その後は損失がステップごとには下がらない"
        "「安定性の縁」で学習を続ける。曲線は下からも上からも線に届きうる。線の下で終わる曲線は、この短い学習ではそこに届いていない。固有値は、基底をすべて直交に保つランチョス法による。トレースは少数の"
        "乱数ベクトルにわたる平均で、縦棒はその標準誤差である。バッチ正規化ではバッチの統計量を使い、短い学習で縁に届くように"
        "学習率を大きくしてある。破線は小さい方の学習率、損失とトレースとその他の固有値は大きい方の学習率のものである。",
    ),
    "regularisation": (
        "A deep network memorises a small training set. Training and test error at the end, with weight decay, dropped branches "
        "(drop path), dropout, mixed images (mixup), smoothed labels, and without any regulariser. None of them is sure to help; in the quick run on the "
        "digits none lowered the test error.",
        "深いネットワークは少ないデータを丸暗記する。重み減衰、枝の脱落、ドロップアウト、画像の混合、ラベルの平滑化を、正則化なしの"
        "場合と並べ、学習後の訓練誤差とテスト誤差を示す。どれも必ず効くわけではなく、数字データの短い実験では、テスト誤差を"
        "下げたものはなかった。",
    ),
    "relatives": (
        "Branches side by side (GoogLeNet), addition (ResNet), concatenation (DenseNet), and attention, whose blocks "
        "are residual too: at roughly equal numbers of parameters they differ in arithmetic, memory and speed.",
        "枝を並べる GoogLeNet、足し合わせる ResNet、連結する DenseNet、そして残差の考えを受け継いだ注意機構。パラメータ数を"
        "ほぼ揃えても、計算量、メモリ、速さは異なる。",
    ),
}

TABLES = {
    "degradation": ("Errors at the end, in percent", "最後の誤差 (%)"),
    "gradients": (
        "Gradient at the first block over that at the last, before training, for three initial variances",
        "学習前の、最初のブロックの勾配と最後のブロックの勾配の比 (三つの初期分散)",
    ),
    "relatives": ("The networks, what they cost, and their errors", "各ネットワークのコストと誤差"),
}
"""What the tables are of."""

WORDS = {
    "network": "ネットワーク", "layers": "層", "seeds": "シード", "plain": "plain", "residual": "残差",
    "train error, %": "訓練誤差、%", "test error, %": "テスト誤差、%", "error, %": "誤差、%",
    "error at the end, %": "最後の誤差、%", "epoch": "エポック", "step": "ステップ", "training images": "訓練画像",
    "test images": "テスト画像", "plain, training images": "plain、訓練画像", "plain, test images": "plain、テスト画像",
    "residual, training images": "残差、訓練画像", "residual, test images": "残差、テスト画像",
    "norm": "正規化", "none": "なし", "batch": "バッチ", "branches start": "枝の初期値", "random": "乱数", "zero": "0",
    "block": "ブロック", "norm of the gradient": "勾配のノルム", "twice He": "He の 2 倍",
    "gradient, first block over last": "勾配の比 (最初 / 最後)", "plain, no norm": "plain、正規化なし",
    "residual, no norm": "残差、正規化なし", "residual from zero": "残差、枝は 0 から", "preact from zero": "前活性、枝は 0 から",
    "preact": "前活性", "number of the removed block": "取り除くブロックの番号", "blocks removed at random": "無作為に取り除く個数",
    "pairs of blocks swapped": "入れ替える組の数", "accuracy, %": "正解率、%", "nothing changed": "変更なし",
    "cannot be removed": "取り除けない", "place of the block, % of the depth": "ブロックの位置 (深さの %)",
    "deviation of what the branch adds": "枝が加える量の標準偏差", "the same over the input's": "入力の標準偏差との比",
    "all kept": "すべて残す", "blocks twice": "再計算", "loop": "ループ",
    "loop, blocks twice": "ループ、再計算", "loop, groups twice": "ループ、群の再計算",
    "memory, MiB (batch 32)": "メモリ、MiB (バッチ 32)", "time of a step, ms": "1 ステップの時間、ms",
    "time to compile, s": "コンパイル時間、s", "weight decay": "重み減衰", "drop path": "枝の脱落", "dropout": "ドロップアウト",
    "mixup": "画像の混合", "label smoothing": "ラベルの平滑化", "regulariser": "正則化", "loss at the end": "最後の損失",
    "loss": "損失", "first direction": "一つ目の方向", "second direction": "二つ目の方向", "parameters": "パラメータ数",
    "MMACs an image": "積和 (百万 / 枚)", "KiB kept": "保持 KiB", "images/s": "枚 / 秒",
    "million multiply-adds an image": "1 枚あたりの積和 (百万)", "KiB kept an image, in training": "学習で 1 枚あたり保持する KiB",
    "sharpness": "鋭さ", "2 / learning rate": "2 / 学習率", "training loss": "訓練損失",
    "trace of the Hessian": "ヘッセ行列のトレース", "eigenvalue of the Hessian": "ヘッセ行列の固有値",
    "largest": "最大", "second": "2 番目", "third": "3 番目", "smallest": "最小", "plain, batch norm": "plain、バッチ正規化",
    "residual, batch norm": "残差、バッチ正規化",
    "densenet": "DenseNet", "images a second, evaluated": "評価速度 (枚 / 秒)", "GoogLeNet": "GoogLeNet", "ResNet": "ResNet", "DenseNet-BC": "DenseNet-BC", "ResNet, activation first": "ResNet (活性が先)",
    "ResNet with attention": "注意機構つき ResNet", "transformer": "トランスフォーマー",
}  # fmt: skip
"""A word in a chart or a table -> the same in Japanese."""
