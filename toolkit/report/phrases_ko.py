"""The phrases of a report in Korean; ``phrases_en`` has the same keys."""

KOREAN = {
    # title and result
    "title": "{run} 보고서",
    "about": "Frostline {version}으로 일부만 미세조정한 {base}. {step} 스텝의 가중치({choice}).",
    "choice_latest": "마지막 체크포인트",
    "score": "검증 손실 {loss}",
    "choice_best": "남아 있는 체크포인트 중 검증 기준으로 가장 나은 것, {score}",
    "choice_both": "마지막 체크포인트이자 남아 있는 것 중 검증 기준으로 가장 나은 것, {score}",
    "choice_other": "마지막 체크포인트도, 남아 있는 것 중 검증 기준으로 가장 나은 것도 아님",
    "choice_folds": "폴드 {count}개에서 하나씩",
    "better_step": "검증 행 기준으로는 {step} 스텝이 더 낫습니다({score}).",
    "result": "결과",
    "values": "{value} {interval}, 비교 대상 {other} {other_interval}, 차이 {difference} {difference_interval}",
    "result_better": "미리 정한 지표 {metric}에서 미세조정한 모델이 {against}보다 낫습니다: {values}.",
    "result_worse": "미리 정한 지표 {metric}에서 미세조정한 모델이 {against}보다 못합니다: {values}.",
    "result_none_shown": "미리 정한 지표 {metric}에서 {against} 대비 차이가 확인되지 않았습니다: {values}.",
    "result_few": (
        "서로 독립인 행이 {least}개보다 적어 아무것도 주장하지 않습니다. 미리 정한 지표 {metric}에서 미세조정한 모델과 "
        "{against}: {values}."
    ),
    "result_undirected": (
        "미리 정한 지표 {metric}에서 미세조정한 모델과 {against}: {values}. 이 지표는 높고 낮음에 우열이 없습니다."
    ),
    "result_alone": (
        "미리 정한 지표 {metric}에서 미세조정한 모델의 값은 {value} {interval}입니다. 함께 평가한 모델이 없어 아무것도 "
        "주장하지 않습니다."
    ),
    "result_trivial": "가장 좋은 단순 응답({name})의 값은 {value} {interval}입니다.",
    "result_no_trivial": "이 지표로 채점할 수 있는 단순 응답은 없습니다.",
    "result_missing": "이 보고서에는 점수가 없으므로 모델이 나아졌는지 알 수 없습니다. 다음 명령이 점수를 더합니다.",
    "rows_held_out": "학습에서 떼어 둔 {rows}개 행으로 평가했습니다{part}.",
    "rows_grouped": "이 행들은 {units}개 그룹에 속하며, 그룹끼리만 서로 독립입니다.",
    "rows_seen": "학습에 쓴 파일의 {rows}개 행으로 평가했습니다. 이 점수는 새로운 행에서의 성능을 보여 주지 않습니다.",
    "rows_unknown": "{rows}개 행으로 평가했습니다. 그중 일부를 학습했는지는 알 수 없습니다.",
    "of_validation": "(검증 행. 체크포인트를 고르는 데 쓰였을 수 있습니다)",
    "of_test": "(테스트 행)",
    "of_folds": "(각 행은 그 행을 보지 않은 폴드가 평가)",
    # what was trained
    "trained": "학습한 부분",
    "mask_title": "모델의 각 부분. 아래가 입력, 위가 출력층(head)",
    "frost_line": "동결선: 아래는 고정",
    "trained_share": "전체 파라미터 {total}개 중 {trained}개({share})를 학습했습니다.",
    "trained_only": "파라미터 {trained}개를 학습했습니다. 전체 파라미터 수는 기록되지 않았습니다.",
    "line_within": "동결선은 전체 {blocks}개 블록 중 {boundary}번 블록에 있으며, 그 아래는 고정했습니다.",
    "line_above": "동결선은 {blocks}개 블록 모두의 위에 있으며, 블록은 모두 고정했습니다.",
    "line_none": "동결선이 맨 아래에 있어 고정된 앞부분이 없습니다.",
    "adapters": "랭크 {rank}, 알파 {alpha}인 {kind} 어댑터를 선형층 {count}개 옆에서 학습했습니다.",
    "table_rows": "{table}의 {count}개 행을 학습했고 나머지 행은 고정했습니다.",
    "quantised": "고정한 선형층 {count}개를 {precision} 정밀도로 두었습니다.",
    "tied_untie": "출력층(head)은 독립된 텐서입니다. 원본 모델에서는 임베딩과 한 텐서입니다.",
    "tied_both": "출력층(head)과 임베딩이 한 텐서이며, 전체를 학습했습니다.",
    "tied_head_only": (
        "출력층(head)과 임베딩이 한 텐서이며, 출력층을 통해서만 학습했습니다. 임베딩도 함께 바뀌었습니다."
    ),
    "phases": "학습 중에 학습 범위가 바뀌었습니다. 그림과 수치는 모든 단계를 합한 것입니다.",
    "rotation": (
        "블록이 번갈아 학습되었습니다({method}): 한 번에 {blocks}개, {steps} 스텝씩. 그림과 수치는 모두 합한 것입니다."
    ),
    "phase": "{first}–{last} 스텝: 파라미터 {parameters}개, 동결선은 {boundary}번 블록",
    "part": "부분", "tensors": "텐서", "parameters": "파라미터", "state": "상태", "total": "합계",
    "part_embeddings": "임베딩", "part_other": "기타", "part_block": "블록", "part_blocks": "블록",
    "part_norm": "정규화", "part_head": "출력층(head)", "state_frozen": "고정", "state_trained": "학습",
    "state_partly": "{share} 학습",
    # curves
    "curves": "학습 곡선", "curve_loss": "스텝별 손실(토큰당 nat)", "curve_rate": "스텝별 학습률",
    "curve_loss_label": "{steps} 스텝 동안 학습 손실 {first} → {last}. {validation}",
    "curve_rate_label": "{steps} 스텝 동안의 학습률, 최댓값 {most}",
    "legend_train": "학습", "legend_validation": "검증",
    "curve_best": "가장 낮은 검증 손실 {loss}({step} 스텝)",
    "curve_no_validation": "검증 손실 없음", "curve_folds": "선 하나가 폴드 하나",
    "curves_missing": "실행 폴더에 metrics.jsonl이 없어 곡선을 그릴 수 없습니다.",
    # scores
    "scores": "점수", "metric": "지표", "declared": "미리 정한 지표", "higher": "높을수록 좋음",
    "lower": "낮을수록 좋음", "model_run": "미세조정", "model_base": "원본 모델",
    "model_corrected": "원본 모델(사전 확률 보정)",
    "its_base": "원본 모델", "model_shots": "원본 모델(예시 {count}개)", "difference": "{against} 대비 차이",
    "trivial": "단순 응답", "trivial_majority": "학습 행의 최빈 클래스",
    "trivial_majority_here": "이 행들의 최빈 클래스",
    "trivial_prior": "학습 행의 클래스 비율",
    "trivial_prior_here": "이 행들의 클래스 비율",
    "trivial_plain": "학습 행에 맞춘 TF-IDF + 로지스틱 회귀",
    "trivial_last": "근거 글의 마지막 문장",
    "trivial_question": "질문에 가장 가까운 문장",
    "trivial_another": "다른 행의 답변",
    "trivial_oracle": "오라클: 정답에 가장 가까운 문장",
    "verdict_better": "나음", "verdict_worse": "못함", "verdict_none": "차이 확인 안 됨",
    "verdict_few": "행이 너무 적음",
    "scores_note": (
        "대괄호는 행(또는 그룹)을 {resamples}번 재표집해 얻은 95% 구간이며, 차이도 같은 표본으로 계산했습니다. "
        "{metric} 이외의 지표에 대한 판정은 지표 수에 맞게 보정했습니다(Holm). 구간은 행에 따른 변동을 나타내며, 학습 "
        "시드에 따른 변동은 나타내지 않습니다."
    ),
    "details": "레이블별·필드별 점수",
    "scores_missing": "이 보고서는 평가 없이 만들었습니다.",
    "answered_note": "생성한 답변의 지표는 처음 {answered}개 행에 대한 것입니다.",
    # answers
    "answers": "답변 비교",
    "answers_note": (
        "답변을 생성한 {answered}개 행 중 처음 {shown}개입니다. 원본 모델의 답변에서 빠진 낱말에는 "
        "<del>취소선</del>을, 미세조정한 모델이 새로 쓴 낱말에는 <ins>밑줄</ins>을 그었습니다."
    ),
    "answers_plain": "답변을 생성한 {answered}개 행 중 처음 {shown}개입니다.",
    "answers_missing": "생성한 답변이 없습니다.",
    "row": "{number}번째 행", "question": "질문", "contexts": "근거 글", "reference": "정답", "no_answer": "(빈 답변)",
    "contamination": (
        "행의 출처({sources})는 원본 모델이 만들어지기 전에 공개된 자료입니다. 원본 모델이 이미 보았을 가능성을 "
        "배제할 수 없어 두 점수가 모두 높게 나올 수 있으며, 차이는 그 영향을 덜 받습니다."
    ),
    # drift and forgetting
    "forgetting": "드리프트와 망각",
    "forgetting_missing": "측정하지 않았습니다. 다음 명령은 일상 질문과 정답 있는 문항으로 둘 다 측정합니다.",
    "forgetting_drift": "드리프트",
    "forgetting_drift_note": (
        "일상 질문 {rows}개에 대한 원본 모델 자신의 답변을 채점한 손실입니다. 과제와 무관한 곳에서 모델이 얼마나 "
        "달라졌는지를 나타내며, 달라진 것 자체는 좋지도 나쁘지도 않습니다."
    ),
    "forgetting_items": "망각",
    "forgetting_items_note": "다른 능력을 묻는 정답 있는 문항 {rows}개의 점수입니다. 미리 정한 지표는 {metric}입니다.",
    # data
    "data": "데이터 점검", "data_source": "데이터", "data_task": "과제", "data_train": "학습 행",
    "data_validation": "검증 행", "data_test": "테스트 행", "data_skipped": "건너뛴 불량 행",
    "data_shortened": "근거 글이 잘린 행",
    "data_length": "행의 최대 토큰 수(data.max_length)",
    "data_seed": "분할과 순서의 시드", "data_group": "그룹 기준", "data_stratify": "층화 기준", "data_files": "파일",
    "data_fold": "폴드", "bytes": "{size}바이트", "unknown": "기록되지 않음", "none": "없음",
    "data_note": "실행이 데이터에 대해 기록한 내용입니다. 중복, 누출, 개인 식별 정보는 다음 명령으로 찾습니다.",
    # cost
    "cost": "비용", "cost_steps": "옵티마이저 스텝", "cost_epochs": "에폭", "cost_tokens": "읽은 토큰",
    "cost_supervised": "손실을 계산한 토큰", "cost_seconds": "스텝에 걸린 시간", "cost_speed": "초당 토큰",
    "cost_memory": "랭크당 최대 메모리", "cost_planned": "계획한 텐서 최대 메모리",
    "cost_note": "시간은 학습 스텝의 합이며 준비, 검증, 체크포인트 저장은 빠져 있습니다.",
    "cost_memory_cpu": "CPU에서 측정한 최대 메모리에는 Python과 라이브러리가 포함됩니다.",
    "of": "{whole} 중 {part}", "gib": "{size} GiB",
    "time": "{hours}시간 {minutes}분 {seconds}초",
    # versions
    "versions": "버전과 하드웨어", "engine": "엔진", "ranks": "랭크 수", "device": "장치", "cpu_cores": "CPU 코어",
    "system": "시스템",
    # how to repeat it
    "repeat": "재현 방법",
    "repeat_train": "실행이 저장한 레시피로 다른 폴더에 새로 학습합니다.",
    "repeat_ds": "엔진 {engine}, 랭크 {ranks}개로 학습했습니다. 같은 DeepSpeed 파일과 같은 랭크 수로 시작하십시오.",
    "repeat_report": "평가하고 이 보고서를 만듭니다.",
    "recipe": "전체 레시피", "fingerprints": "입력의 SHA-256", "fingerprint_data": "학습·검증 행",
    "fingerprint_test": "테스트 행", "fingerprint_tokenizer": "토크나이저", "fingerprint_chat_template": "대화 템플릿",
    "fingerprint_base": "원본 가중치", "fingerprint_schedule": "학습 범위(마스크)",
    # methods
    "methods": "논문에 붙여 넣을 방법 설명",
    "m_model": "{base}(리비전 {revision}, 가중치 SHA-256 {sha})의 일부를 Frostline {version}으로 미세조정하였다.",
    "m_unpinned": "미지정",
    "m_mask_share": "전체 파라미터 {total}개 중 {mask} 선택자로 고른 {trained}개({share})를 학습하였고, {line}",
    "m_rotation": "블록은 {paper} 방식으로 번갈아 학습하였다(한 번에 {blocks}개, {steps} 옵티마이저 스텝씩).",
    "m_rotation_lisa": "LISA(arXiv 2403.17919, 임베딩과 헤드는 항상 학습)",
    "m_rotation_badam": "BAdam(arXiv 2404.02827, 차례마다 모멘트를 새로 시작)",
    "m_rotation_frostline": "동결선 위 무작위 추출",
    "m_mask_only": "{mask} 선택자로 고른 파라미터 {trained}개를 학습하였고, {line}",
    "m_line": "임베딩과 트랜스포머 블록 {blocks}개 중 아래쪽 {boundary}개는 고정하였다.",
    "m_line_head": "트랜스포머 블록 {blocks}개 중 아래쪽 {boundary}개는 고정하였다.",
    "m_line_none": "전체가 고정된 블록은 없다.",
    "m_data": (
        "학습에는 {source}의 {rows}개 행(과제 {task})을 행당 최대 {length} 토큰으로 사용하였으며, 손실은 지도 대상 "
        "토큰에 대한 평균이다."
    ),
    "m_validation_share": "전체 행의 {share}를 검증용으로 떼어 두었다(시드 {seed}).",
    "m_validation_set": "검증에는 별도의 데이터를 사용하였다.",
    "m_test_share": "전체 행의 {share}를 테스트용으로 떼어 두었다.",
    "m_test_set": "별도의 테스트 데이터를 떼어 두었다.",
    "m_folds": "행을 {count}개 폴드로 나누었다(시드 {seed}).",
    "m_group": "{group} 값이 같은 행은 분할의 같은 쪽에 두었다.",
    "m_optimizer": (
        "옵티마이저는 {optimizer}(β₁ = {beta1}, β₂ = {beta2}, ε = {eps}, 가중치 감쇠 {decay}), 최대 학습률은 "
        "{rate}이며, 전체 스텝의 {warmup} 동안 선형으로 예열한 뒤 {schedule}. 기울기는 {clip}."
    ),
    "m_clip": "노름이 {norm} 이하가 되도록 잘랐다", "m_no_clip": "자르지 않았다",
    "schedule_linear": "0까지 선형으로 낮추었다",
    "schedule_cosine": "0까지 코사인 곡선으로 낮추었다",
    "schedule_constant_with_warmup": "일정하게 유지하였다",
    "m_epochs": (
        "스텝당 {batch}개 행으로 최대 {epochs} 에폭, {steps} 스텝을 {dtype} 정밀도와 float32 마스터 가중치로 "
        "학습하였다(시드 {seed})."
    ),
    "m_evaluation": (
        "{step} 스텝의 가중치를{held_out} {rows}개 행에서 평가하였다(비교 대상: {against}). 지표는 미리 "
        "정하였다({metric})."
    ),
    "m_evaluation_folds": (
        "각 폴드를{held_out} {rows}개 행에서 평가하였다(비교 대상: {against}). 지표는 미리 정하였다({metric})."
    ),
    "m_held_out": " 학습에서 떼어 둔", "m_nothing": "없음",
    "m_bootstrap": (
        "구간은 행(또는 그룹)을 {resamples}번 재표집한 부트스트랩의 95% 백분위 구간이며, 차이는 짝지어 계산하였다. "
        "다른 지표에 대한 5% 수준의 판정은 Holm의 방법으로 보정하였고, 서로 독립인 행이 {least}개보다 적으면 아무것도 "
        "주장하지 않았다."
    ),
    "m_versions": "소프트웨어: {versions}.",
    "footer": (
        "라이선스와 용도는 원본 모델의 것을 따릅니다. 이 파일에 담긴 행과 답변은 데이터와 똑같이 보호해야 합니다."
    ),
}  # fmt: skip
"""By key; ``{name}`` is where a value stands."""
