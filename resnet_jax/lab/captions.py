"""Titles and captions of the experiments' figures, in English and Japanese."""

TITLES = {
    "degradation": ("Deeper plain networks get worse", "深い plain ネットワークは悪くなる"),
    "gradients": ("What reaches the first layer", "最初の層に届く勾配"),
    "lesion": ("Removing blocks from a trained network", "学習後にブロックを取り除く"),
    "response": ("How close blocks are to the identity", "ブロックは恒等写像にどれだけ近いか"),
    "memory": ("What depth costs", "深さの代償"),
    "landscape": ("The loss around a trained network", "学習後の損失地形"),
    "regularisation": ("Regularisers on a small set", "少ないデータと正則化"),
    "relatives": ("The relatives", "親戚たち"),
}

CAPTIONS = {
    "degradation": (
        "Networks of the same depth and the same number of parameters, with the same recipe. Without shortcuts the deep ones "
        "have a higher error on the training images themselves: this is not overfitting, they are harder to optimise. With "
        "shortcuts depth does no harm, since a block that is not needed can stay near the identity.",
        "深さもパラメータ数も学習条件も同じネットワークの比較。ショートカットがないと、深いほど訓練画像に対する誤差そのものが"
        "高くなる。過学習ではなく、最適化が難しいのである。ショートカットがあれば、不要なブロックは恒等写像の近くに"
        "とどまれるので、深くしても害がない。",
    ),
    "gradients": (
        "The norm of the loss's gradient at the output of each block, before training. In a plain network without norms every "
        "layer multiplies it: with LeCun's variance it vanishes towards the first layer, with twice He's it explodes. Batch "
        "normalisation keeps the scale in check, and the shortcut passes the gradient on unchanged around every branch: the "
        "Jacobian of a block is that of its branch plus the identity, which is checked numerically here.",
        "学習前に、各ブロックの出力における損失の勾配の大きさを測った。正規化のない plain ネットワークでは層ごとに倍率が"
        "かかり、LeCun の分散では最初の層に向かって消え、He の 2 倍の分散では爆発する。バッチ正規化は大きさを整え、"
        "ショートカットはどの枝も迂回して勾配をそのまま伝える。ブロックのヤコビ行列は枝のヤコビ行列に単位行列を足した"
        "ものであり、ここで数値的にも確かめている。",
    ),
    "lesion": (
        "Blocks are taken out of a trained network, or change places, with nothing trained again. The residual network loses "
        "little with each: its many paths of different lengths work in parallel. In a plain network there is only one path, "
        "and a single missing block breaks it.",
        "学習済みのネットワークから、再学習なしにブロックを取り除いたり入れ替えたりする。残差ネットワークでは長さの異なる多数の"
        "経路が並列に働くため、一つ失っても影響は小さい。plain ネットワークの経路は一本しかなく、一つ欠けると壊れる。",
    ),
    "response": (
        "The standard deviation of what each branch adds, and its ratio to that of the block's input. The deeper the network, the "
        "less a block changes its input on average: blocks refine what is there.",
        "各ブロックの枝が加える量の標準偏差と、入力に対するその比。平均して見れば、ネットワークが深いほど"
        "一つのブロックの変化は小さい。ブロックは受け取ったものを少しずつ磨き上げている。",
    ),
    "memory": (
        "What a compiled training step needs besides the state. Keeping all activations costs memory in proportion to the "
        "depth; computing blocks again in the backward pass saves memory and costs time. Equal blocks in a loop compile "
        "as fast for a thousand layers as for twenty.",
        "コンパイル済みの学習 1 ステップに、状態とは別に必要なメモリ。すべての活性を残すと深さに比例して増える。逆伝播の際に"
        "ブロックを計算し直せば、時間と引き換えに減らせる。同じ形のブロックをループにすれば、千層でも二十層と同じ速さで"
        "コンパイルできる。",
    ),
    "landscape": (
        "The loss on a plane through the trained network, spanned by two random directions whose filters are scaled to those of "
        "the network. Batch norms take the statistics of the batch at every point. Compare how wide and how smooth the valleys "
        "are: at twenty layers they hardly differ; with more layers plain networks no longer find a valley at all.",
        "学習済みのネットワークを通り、フィルタの大きさを揃えた二つの乱数方向が張る平面上の損失。バッチ正規化は各点でバッチの"
        "統計量を使う。谷の広さとなめらかさを比べてほしい。二十層ではほとんど差がない。plain との違いは深さとともに現れ、"
        "深い plain ネットワークは谷そのものを見つけられなくなる。",
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
