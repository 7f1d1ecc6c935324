"""All that the page says, in English and Chinese. What an option does is in English told by the option itself."""

from __future__ import annotations

from wan.options import FLAGS

LANGUAGES = {"en": "English", "zh": "中文"}

# Key -> English, Chinese.
TEXTS = {
    "title": ("Swan", "Swan"),
    "language": ("Language", "语言"),
    "log_out": ("Log out", "退出登录"),
    "log_in": ("Log in", "登录"),
    "key": ("Key", "密钥"),
    "key_wrong": ("This is no valid key", "密钥无效"),
    "key_help": ("One of the keys of this server", "本服务器的任一密钥"),
    "generate": ("Generate", "生成"),
    "model": ("Model", "模型"),
    "inputs": ("Made from", "输入素材"),
    "shape": ("Size and length", "尺寸与时长"),
    "sampling": ("Sampling", "采样"),
    "caching": ("Cache", "缓存加速"),
    "loras": ("LoRAs", "LoRA"),
    "no_loras": ("This server has no LoRAs: see --lora_dir", "本服务器没有 LoRA：见 --lora_dir"),
    "others": ("All other options", "其他全部选项"),
    "others_label": ("Options, one a line: name = value; or JSON", "选项，每行一个：名称 = 值；也可用 JSON"),
    "others_list": ("What there is", "可用选项"),
    "usual": ("default: {value}", "默认：{value}"),
    "none": ("none", "无"),
    "random": ("random", "随机"),
    "seconds": ("Seconds", "秒数"),
    "seconds_help": ("how long it is; frames count for more", "视频时长；若同时填写帧数，以帧数为准"),
    "guidance_low": ("Guidance, low noise", "引导强度（低噪声）"),
    "guidance_high": ("Guidance, high noise", "引导强度（高噪声）"),
    "cache_choice": ("Cache", "缓存"),
    "cache_choice_help": (
        "skip what changes little from step to step; auto: what was measured to be best",
        "跳过各步之间变化很小的计算；auto：采用实测最佳的方案",
    ),
    "lora_name": ("LoRA {number}", "LoRA {number}"),
    "lora_strength": ("Strength", "强度"),
    "lora_expert": ("For", "用于"),
    "both": ("both experts", "两个专家"),
    "high": ("high noise", "高噪声专家"),
    "low": ("low noise", "低噪声专家"),
    "job": ("This video", "当前视频"),
    "no_job": (
        "Nothing is made yet: say what you want to see, then Generate.",
        "还没有视频：写下想看的画面，然后点击生成。",
    ),
    "cancel": ("Cancel", "取消"),
    "delete": ("Delete", "删除"),
    "again": ("Use these settings again", "再次使用这些设置"),
    "download": ("Download", "下载"),
    "gallery": ("Videos", "作品"),
    "gallery_empty": ("No videos yet", "还没有作品"),
    "more": ("Show older ones", "显示更早的"),
    "settings": ("Settings", "设置"),
    "preview": ("Preview", "预览"),
    "step": ("step {done} of {total}", "第 {done} / {total} 步"),
    "left": ("about {time} left", "大约还需 {time}"),
    "took": ("made in {time}", "用时 {time}"),
    "expected": ("expected to take {time}", "预计需要 {time}"),
    "frames_fps": ("{frames} frames, {fps} per second", "{frames} 帧，每秒 {fps} 帧"),
    "queue_next": ("next in the queue", "排队中，下一个"),
    "queue_place": ("{count} before it in the queue", "排队中，前面还有 {count} 个"),
    "queue_state": ("{running} being made, {queued} waiting", "{running} 个正在生成，{queued} 个等待中"),
    "starting": ("The server is starting: videos wait until it is ready", "服务器正在启动：就绪之前视频会先排队"),
    "queued": ("Waiting", "等待中"),
    "in_progress": ("Being made", "生成中"),
    "completed": ("Done", "已完成"),
    "failed": ("Failed", "失败"),
    "cancelled": ("Cancelled", "已取消"),
    "deleted": ("Deleted", "已删除"),
    "stage_encode": ("reading the prompt", "读取提示词"),
    "stage_load": ("loading the model", "加载模型"),
    "stage_denoise": ("denoising", "去噪"),
    "stage_decode": ("decoding", "解码"),
    "accepted": ("Accepted", "已接受"),
    "refused": ("This cannot be made: {why}", "无法生成：{why}"),
    "send_again": ("{name}: the file is not here any more: send it again", "{name}：文件已不在，请重新上传"),
    "gone": ("This video is gone", "这个视频已不存在"),
    "taken_over": ("The settings are those of that video now", "已填入该视频的设置"),
    "model_gone": ("The model {model} is not served any more", "模型 {model} 已不再提供"),
    "line_wrong": ("line {number} of the other options is not NAME = VALUE", "其他选项第 {number} 行不是“名称 = 值”"),
    "json_wrong": ("the other options are no valid JSON object", "其他选项不是有效的 JSON 对象"),
    "twice": ("{name} is given twice: in its field and among the other options", "{name} 重复：字段与其他选项中都有"),
    "hours": ("{count} h", "{count} 小时"),
    "minutes": ("{count} min", "{count} 分钟"),
    "time_seconds": ("{count} s", "{count} 秒"),
}

# What the fields of options are called: flag -> English, Chinese.
LABELS = {
    "prompt": ("Prompt", "提示词"),
    "negative_prompt": ("Negative prompt", "负面提示词"),
    "prompts": ("Prompts of the clips, one a line", "各片段的提示词，每行一个"),
    "image": ("First frame", "首帧图片"),
    "last_frame": ("Last frame", "尾帧图片"),
    "video": ("Video to make anew", "要重绘的视频"),
    "continue_from": ("Video to continue", "要续写的视频"),
    "src_video": ("Source video", "源视频"),
    "src_mask": ("Mask", "遮罩"),
    "src_ref_images": ("Reference pictures", "参考图片"),
    "context_scale": ("Weight of the sources", "素材权重"),
    "inpaint": ("Inpaint mask", "局部重绘遮罩"),
    "outpaint": ("Outpaint: left, top, right, bottom", "外扩：左、上、右、下"),
    "extend": ("Clip it begins with", "开头片段"),
    "audio": ("Speech or song", "语音或歌曲"),
    "audio_sync": ("Sound in step", "音画同步"),
    "pose_video": ("Pose video", "姿态视频"),
    "num_clip": ("Clips", "片段数"),
    "infer_frames": ("Frames of a clip", "每段帧数"),
    "start_from_ref": ("Begin with the image itself", "以图片本身开头"),
    "src_pose": ("Pose video", "姿态视频"),
    "src_face": ("Face video", "面部视频"),
    "src_ref": ("Character", "角色图片"),
    "replace_flag": ("Replace a character", "替换角色"),
    "src_bg": ("Background video", "背景视频"),
    "refert_num": ("Frames of the clip before", "承接上一段的帧数"),
    "strength": ("Strength of the change", "重绘强度"),
    "preset": ("Preset", "预设"),
    "size": ("Size", "尺寸"),
    "frame_num": ("Frames", "帧数"),
    "fps": ("Frames per second", "帧率"),
    "seed": ("Seed", "随机种子"),
    "sample_steps": ("Steps", "步数"),
    "sample_shift": ("Shift", "偏移"),
    "sample_guide_scale": ("Guidance", "引导强度"),
    "sample_solver": ("Solver", "求解器"),
    "cache_quality": ("Quality", "质量"),
    "fb_thresh": ("Threshold", "阈值"),
    "fb_metric": ("Measure", "度量"),
    "teacache_thresh": ("Threshold", "阈值"),
    "teacache_policy": ("Rescaling", "缩放方式"),
    "easy_thresh": ("Threshold", "阈值"),
    "mag_thresh": ("Threshold", "阈值"),
    "mag_K": ("Skips in a row", "连续跳过上限"),
    "mag_retention": ("Steps computed first", "起始计算比例"),
    "cache_max_skips": ("Skips in a row", "连续跳过上限"),
    "cache_force": ("Also in few steps", "步数很少时也启用"),
}

# What options do, in Chinese.
HELP = {
    "prompt": "视频展示的内容",
    "prompts": "由多个片段组成的影片：每行一个提示词，每段一个；最后一个沿用到结尾",
    "use_prompt_extend": "让语言模型写出更长的提示词，会显示并保存；失败时沿用原提示词",
    "prompt_extend_target_lang": "扩写后提示词的语言：zh（默认）或 en",
    "negative_prompt": "不希望出现的内容；默认：任务的官方文本",
    "image": "作为起点的图片（i2v、flf2v、ti2v）",
    "last_frame": "最后一帧（flf2v、vace、i2v-A14B）",
    "video": "要重绘的视频或图片：见 strength（t2v、i2v、ti2v）",
    "continue_from": "第一段从该视频的末尾几帧接着生成（i2v、ti2v、vace）",
    "src_video": "用于引导、或被部分重绘的视频或图片（vace）",
    "src_mask": "其遮罩，视频或图片：白色重绘，黑色保留（vace）；角色所在处为白色的视频（animate）",
    "src_ref_images": "视频中出现的事物的图片（vace）",
    "context_scale": "这些素材的权重；默认 1（vace）",
    "inpaint": "同 src_mask，但不看 src_video 在该处的内容（vace）",
    "outpaint": "在 src_video 四周增加的像素（vace）",
    "extend": "视频开头的片段或图片；另见 last_frame（vace）",
    "audio": "语音或歌曲，FFmpeg 能读取的任何格式（s2v）",
    "audio_sync": "exact（默认）：说话时即听到；official：从影片开头播放，晚 3 帧（s2v）",
    "pose_video": "驱动动作的姿态视频（s2v）",
    "num_clip": "要生成的片段数；默认且最多为音频所需的数量（s2v）",
    "infer_frames": "每段的帧数，4n；默认 80（s2v）",
    "start_from_ref": "以图片本身作为开头（s2v）",
    "src_pose": "姿态视频，尺寸与结果相同（animate）",
    "src_face": "只含面部的视频，512x512（animate）",
    "src_ref": "角色的图片（animate）",
    "replace_flag": "用该角色替换另一个角色：需要背景和遮罩（animate）",
    "src_bg": "去掉原角色的视频，其位置为黑色（animate）",
    "refert_num": "每段承接上一段的帧数，1（默认）或 5（animate）",
    "size": "像素，如 832*480 或 832x480；有图片时只取面积，宽高比随图片",
    "frame_num": "帧数，4n+1；animate 为每段的帧数",
    "overlap": "续写的片段承接之前影片的帧数，4n+1；默认 1 或 5",
    "trim_first_frames": "去掉最前面的 N 帧，蒸馏模型可能使其失真",
    "fps": "文件每秒的帧数",
    "seed": "默认 -1：随机，并会显示出来",
    "sample_solver": "可选：unipc、dpm++、euler、dmd、rcm、rcm-ode",
    "denoising_step_list": "步数蒸馏模型的时间步，如 1000,750,500,250",
    "sigmas": "每一步的噪声水平，不做偏移，如 1,0.757,0.522",
    "phases": "把步骤分成几段，各有引导、LoRA、求解器和专家，如 “steps=2,guide=3.5,lora=0 | steps=4,guide=1”",
    "sigma_max": "rcm 起始的噪声，数据为 1；默认 80",
    "sample_steps": "步数",
    "strength": "对视频改变多少：实际执行的步数比例，大于 0 且不超过 1；默认 0.8",
    "sample_shift": "噪声日程的偏移",
    "sample_guide_scale": "引导强度；A14B 任务的两个专家为 低,高；1 表示关闭",
    "boundary": "低于该噪声水平（0 到 1）时由低噪声专家工作；默认：任务自带",
    "boundary_step_index": "低噪声专家的第一步；默认：按噪声水平",
    "lora": "用于 DiT 的 LoRA，强度为 X；可重复",
    "lora_high": "只用于高噪声专家的 LoRA，强度为 X；可重复",
    "lora_low": "只用于低噪声专家的 LoRA，强度为 X；可重复",
    "vae_tile_px": "按该像素数分块解码；0：整帧；默认：放得下就为 0",
    "use_relighting_lora": "使用检查点自带的 LoRA，让角色的光照与背景一致（animate）",
    "preset": "某类模型的整套设置",
    "fbcache": "按第一个块之后的变化来跳过",
    "fb_thresh": "允许多大的变化；0：不允许；默认 0.08",
    "fb_metric": "度量方式：hidden_rel_l1、residual_rel_l1、hidden_rel_l2；默认 hidden_rel_l1",
    "fb_downsample": "每 N 个 token 看一个；默认 1",
    "fb_ema": "平滑；默认 0",
    "fb_warmup": "每个专家的前 N 步总是计算；默认 1",
    "fb_last_steps": "每个专家的最后 N 步总是计算；默认 1",
    "fb_cfg_sep_diff": "无条件分支测量自身的变化，并服从有条件分支；默认 true",
    "teacache": "按时间嵌入的变化来跳过",
    "teacache_thresh": "允许多大的变化；0：不允许；默认 0.08",
    "teacache_policy": "缩放方式：linear、polynomial、polynomial_projection；默认 linear",
    "teacache_polynomial": "用此多项式（最高次在前）代替实测的多项式",
    "teacache_warmup": "每个专家的前 N 步总是计算；默认 1",
    "teacache_last_steps": "每个专家的最后 N 步总是计算；默认 1",
    "teacache_alternating": "从不连续跳过两次",
    "easycache": "按预测随输入移动的距离来跳过",
    "easy_thresh": "允许多大的变化；0：不允许；默认 0.05",
    "magcache": "按实测的残差幅度下降来跳过",
    "mag_thresh": "允许多大的变化；0：不允许；默认 0.12",
    "mag_K": "最多连续跳过 N 次；默认 4",
    "mag_retention": "每个专家开头总是计算的步数比例；默认 0.2",
    "mag_ratios": "用这些比例（每步一个）代替实测值",
    "cache_max_skips": "最多连续跳过 N 次；默认 5",
    "cache_predictor": "跳过的步加上最近的残差（zero，默认），或由最近两个线性（first）或以渐弱的斜率（damped）外推",
    "cache_device": "残差存放处：auto（默认：与模型同处）、cpu、cuda、cuda:N",
    "cache_force": "允许在少于 10 步的运行中使用缓存",
    "cache": "auto：采用对该模型和步数实测最佳的缓存",
    "cache_quality": "cache auto 时与无缓存视频的接近程度：high（45 dB）、medium（40 dB）；默认 medium",
}


def text(key: str, language: str, **values: object) -> str:
    return _of(TEXTS[key], language).format(**values)


def label(flag: str, language: str) -> str:
    return _of(LABELS[flag], language)


def help_of(flag: str, language: str) -> str:
    return FLAGS[flag].help if language == "en" else HELP[flag]


def time_text(seconds: float, language: str) -> str:
    """A time to wait, as people say it."""
    if seconds < 90:
        return text("time_seconds", language, count=max(1, round(seconds)))
    if seconds < 5400:
        return text("minutes", language, count=round(seconds / 60))
    return text("hours", language, count=f"{seconds / 3600:.1f}")


def language_of(accept: str) -> str:
    """The page's language for a browser's Accept-Language: of those that it names, the one that it likes best."""

    def weight(part: str) -> float:
        try:
            return float(part.partition(";q=")[2] or 1)
        except ValueError:
            return 0.0

    for part in sorted(accept.split(","), key=weight, reverse=True):
        if (name := part.strip()[:2].lower()) in LANGUAGES:
            return name
    return "en"


def _of(texts: tuple[str, ...], language: str) -> str:
    return dict(zip(LANGUAGES, texts)).get(language, texts[0])
