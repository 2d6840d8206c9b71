"""make mutants: every protection is removed once, and a test must fail. [ONLY="part of a name"]

    .venv/bin/python tests/mutants.py [part of a name]

In:  MUTANTS, the protections as changes of one place of the code, each with the tests that hold it.
Out: a table of protection, test, and whether it was caught, and the time. Exit status 1 if one was not caught, if its text is not in the
     code exactly once, or if the tests fail without any change.

The changes are made in a copy of the tracked files, so that the checkout stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import forks
from checkout import PEERS, copied
from patience import PATIENCE


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A protection's name, the file below lib/sft, its text, what stands there without it, and tests of which one must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ORDER, DAMAGE, HELD, MANIFEST = "test_order.py", "test_damage.py", "test_protections.py", "test_manifest.py"
FILE_ORDER = f"{ORDER}::test_a_file_is_flushed_before_its_name_and_the_name_after"
STEP_ORDER = f"{ORDER}::test_a_checkpoint_is_on_the_disk_before_it_has_its_name"
STAGE_ORDER = f"{ORDER}::test_a_stage_is_on_the_disk_before_it_is_published_and_its_manifest_comes_last"
NOTHING_RUNS = f"{HELD}::test_no_code_of_a_model_a_pickle_or_a_data_set_is_run"

MUTANTS = (
    # --- buckets
    Mutant("a step on two nodes is complete when both have sent", "sync/send.py", "if not {copy.target for copy in listed} <= _arrived(parts, [copy.target for copy in here], cache):", "if _arrived(parts, [], cache) is None:", "test_uploads.py::test_a_step_whose_files_are_on_two_nodes_is_complete_when_both_have_sent_theirs"),
    Mutant("a list of sent files is of one attempt", "sync/send.py", "{folder.name}-{_digest(record)}", "{folder.name}", "test_uploads.py::test_a_list_of_another_attempt_completes_no_step"),
    Mutant("an object without a CRC32C is compared by its ETag", "storage/transport.py", "sums.bytes == self.bytes and sums.etag == str(self.generation).strip('\"')", "sums.bytes == self.bytes", "test_s3.py::test_an_object_without_a_crc32c_is_compared_by_its_etag"),
    Mutant("a write to S3 states what it replaces", "storage/s3.py", 'return {"IfMatch": str(generation)} if generation else {"IfNoneMatch": "*"}', "return {}", "test_s3.py::test_another_writers_object_is_left_alone"),
    Mutant("an unreachable bucket does not restart a training from its first weights", "training/stored_steps.py", "        if not whole:\n            raise\n", "", "test_uploads.py::test_a_bucket_that_is_away_is_waited_for_where_the_disk_has_no_whole_step"),
    Mutant("a step of two nodes is compared where it is joined", "sync/parts.py", '        raise SftError("; ".join(broken))\n', "        pass\n", "test_uploads.py::test_a_node_joins_its_files_of_a_step_with_those_of_others_that_are_in_the_bucket"),
    Mutant("nodes without a common disk need a bucket", "training/build.py", "        if not where:\n", "        if False:\n", "test_disks.py::test_a_training_whose_nodes_share_no_disk_is_refused_without_a_bucket_before_it_starts"),
    Mutant("layers are gathered ahead", "model/parallel.py", "    _set_prefetch(model, prefetch_layers)\n", "", "test_overlap.py::test_layers_are_gathered_ahead_and_gradients_reduced_between_backward_passes"),
    Mutant("copies are summed once a step", "model/parallel.py", "    model.set_requires_all_reduce(last)\n", "", "test_overlap.py::test_sums_over_copies_wait_for_the_last_microbatch"),
    Mutant("copies of weights follow each step", "model/compute_copies.py", "        optimizer.register_step_post_hook(self.expire)\n", "", "test_keep_gathered.py::test_copies_are_made_once_a_step"),
    Mutant("fp8 needs a GPU that has it", "model/fp8.py", 'if device.type != "cuda" or torch.version.hip:', "if False:", "test_fp8.py::test_a_device_without_these_products_is_refused_at_the_start"),
    # --- the order of writes
    Mutant("write_atomic flushes the file", "common/files.py", "os.fsync(f.fileno())", "pass", FILE_ORDER),
    Mutant("write_atomic flushes the folder", "common/files.py", "    sync_folder(file.parent)\n", "", FILE_ORDER),
    Mutant("write_atomic renames", "common/files.py", "os.replace(temporary, file)", "file.write_bytes(data)", f"{MANIFEST}::test_kill_during_a_write_leaves_the_old_or_the_new_file_whole {FILE_ORDER}"),
    Mutant("a failed write leaves nothing", "common/files.py", "        Path(temporary).unlink(missing_ok=True)\n", "", f"{HELD}::test_a_failed_write_leaves_no_temporary_file"),
    Mutant("a direct file is flushed", "common/direct_io.py", "            os.fsync(self._file)\n", "", FILE_ORDER),
    Mutant("a copy is flushed", "storage/local.py", "os.fsync(out.fileno())", "pass", FILE_ORDER),
    Mutant("a storage's small file is flushed", "storage/local.py", "os.fsync(f.fileno())", "pass", FILE_ORDER),
    Mutant("a storage flushes the folder of a rename", "storage/local.py", "        self._renamed_in.add(folder) if deferred else sync_folder(folder)\n", "", FILE_ORDER),
    Mutant("deferred renames are flushed", "storage/local.py", "            sync_folder(folder)\n        return {}", "            pass\n        return {}", FILE_ORDER),
    Mutant("a step's small files are flushed", "checkpoint/step_folder.py", "        f.flush()\n        os.fsync(f.fileno())", "        f.flush()", STEP_ORDER),
    Mutant("a step's metadata is flushed", "checkpoint/step_folder.py", "                os.fsync(stream.fileno())\n", "", STEP_ORDER),
    Mutant("a step's folders are flushed", "checkpoint/step_folder.py", "        sync_folder(folder)\n    StepManifest", "        pass\n    StepManifest", STEP_ORDER),
    Mutant("a step's new name is flushed", "checkpoint/step_folder.py", "    work.rename(final)\n    sync_folder(final.parent)", "    work.rename(final)", STEP_ORDER),
    Mutant("a stage's files are flushed", "runner/publish.py", "            os.fsync(fd)\n", "            pass\n", STAGE_ORDER),
    Mutant("a stage's folders are flushed", "runner/publish.py", "        sync_folder(parent)\n", "        pass\n", STAGE_ORDER),
    Mutant("a stage's new name is flushed", "runner/stage.py", "            sync_folder(self.run)\n", "", STAGE_ORDER),
    Mutant("a shared result's new name is flushed", "runner/stage.py", "                sync_folder(shared.parent)\n", "", STAGE_ORDER),
    Mutant("records are flushed before their step", "training/metrics.py", "        os.fsync(self._stream.fileno())\n        folder, records", "        folder, records", FILE_ORDER),
    # --- hashes, sizes and seals
    Mutant("an update of a bf16 weight is rounded at random", "training/adamw8bit.py", "value = round_to_bf16(value, bits(operands.place, step, value))", "value = value.bfloat16()", "test_rounding.py::test_small_updates_count_as_in_fp64"),
    Mutant("a second lack of GPU memory ends training", "training/out_of_memory.py", "run.short is not None or least", "least", "test_out_of_memory.py::test_a_second_time_ends_training_although_more_could_be_recomputed"),
    Mutant("a file's bytes are compared", "formats/manifest.py", "if (found := hash_file(file)) != entry.sha256:", "if (found := entry.sha256) != entry.sha256:", f"{MANIFEST}::test_every_damage_is_named"),
    Mutant("a missing file is damage", "formats/manifest.py", '            return f"{file} is missing"', "            return None", f"{MANIFEST}::test_every_damage_is_named"),
    Mutant("a manifest's seal is compared", "formats/manifest.py", "made.seal != seal(value)", "False", DAMAGE),
    Mutant("a manifest keeps its seal", "formats/manifest.py", 'made.seal is None and (made.schema > 1 or "seal" in value)', "False", f"{DAMAGE}::test_a_manifest_whose_seal_was_taken_out_is_refused"),
    Mutant("verify recomputes the key", "runner/verify.py", "made.key == wanted", "True", DAMAGE),
    Mutant("verify looks at every step", "runner/verify.py", 'yield _guarded(f" {step.name}", step_problems, step)', "pass", DAMAGE),
    Mutant("verify looks at the synced copy", "runner/verify.py", "    problems = manifest.broken_outputs(root, synced.files)", "    problems: list[str] = []", DAMAGE),
    Mutant("verify looks at the list of the synced copy", "formats/remote.py", "manifest.load(file).digest != prepared", "not file.is_file()", DAMAGE),
    Mutant("verify names strays", "runner/verify.py", "for name in manifest.strays(folder, made.outputs, beside)", "for name in ()", DAMAGE),
    Mutant("verify looks at BEST", "runner/verify.py", "best.value not in _measured(train, best)", "False", DAMAGE),
    Mutant("verify compares the mark of the inputs", "runner/verify.py", "if known != plan.identity(made.key, made.inputs):", "if False:", DAMAGE),
    Mutant("verify reads run.json", "runner/verify.py", "if os.path.lexists(run / RUN_FILE):", "if False:", DAMAGE),
    Mutant("a pipe in place of a file is not read", "common/files.py", "if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):", "if False:", f"{DAMAGE}::test_a_pipe_in_place_of_a_file_is_found_and_not_waited_for"),
    Mutant("elsewhere.json excuses no file that is here", "formats/elsewhere.py", " or (folder / o.path).is_file()", "", DAMAGE),
    Mutant("a stage hashes what it reads", "runner/upstream.py", "        if broken:\n", "        if False:\n", DAMAGE),
    Mutant("a stage refuses strays", "runner/upstream.py", "if others := manifest.strays(folder, listed, beside):", "if others := []:", DAMAGE),
    Mutant("the report shows no damaged file", "reporting/run_files.py", "        if broken := ", "        if False and ", DAMAGE),
    Mutant("the cache of hashes believes no damaged entry", "common/hashcache.py", " and entry == _sealed(name, entry[:-1])", "", DAMAGE),
    Mutant("a mark's CRC is compared", "formats/identity.py", "words[1] == _crc(words[0])", "len(words[1]) == 8", "test_marks.py"),
    Mutant("a changed record of training is restored", "training/metrics.py", "        write_atomic(file, whole[-1])\n", "        pass\n", "test_metrics.py::test_records_before_a_checkpoint_are_restored_from_its_copy"),
    Mutant("a copy is compared with its manifest", "storage/contract.py", "expected.sha256 and found.sha256 != expected.sha256", "False", "test_storage.py::test_a_source_that_is_not_what_its_manifest_says_fails_and_the_others_arrive"),
    Mutant("a copy is read back", "storage/local.py", "checksums_of(target) != written", "False", f"{HELD}::test_a_copy_is_read_back"),
    Mutant("an identical size is not enough", "storage/local.py", "return checksums_of(self.path(name)).sha256 == (expected.sha256 or sums().sha256)", "return True", "test_storage.py::test_a_bit_flip_at_the_target_is_found_and_repaired"),
    Mutant("a step's bytes are compared before a resume", "checkpoint/step_folder.py", "        return manifest.broken_outputs(step, entries)\n", "        return []\n", "test_checkpoint.py::test_a_damaged_step_is_passed_over"),
    Mutant("training does not begin again beside damaged steps", "checkpoint/step_folder.py", "if world.on_rank0(lambda: holds_steps(out)):", "if False:", "test_marks.py"),
    # --- pickles and code
    Mutant("metadata goes through the restricted unpickler", "checkpoint/dcp_reader.py", "            return _ALLOWED[module, name]\n", "            return super().find_class(module, name)\n", "test_checkpoint.py::test_a_metadata_pickle_runs_nothing"),
    Mutant("a location cannot leave the step", "checkpoint/dcp_reader.py", ' or not re.fullmatch(r"[\\w.-]+", info.relative_path)', "", "test_checkpoint.py::test_a_location_that_leaves_the_folder_is_refused"),
    Mutant("shards are read with weights_only", "checkpoint/dcp_reader.py", '            self.loaded = torch.load(view, map_location="cpu", weights_only=True)', '            self.loaded = torch.load(view, map_location="cpu", weights_only=False)', NOTHING_RUNS),
    Mutant("rank0.pt is read with weights_only", "checkpoint/step_folder.py", 'torch.load(file, map_location="cpu", weights_only=True)', 'torch.load(file, map_location="cpu", weights_only=False)', NOTHING_RUNS),
    Mutant("a base's .bin is read with weights_only", "checkpoint/weight_files.py", "weights_only=True, mmap=True", "weights_only=False, mmap=True", NOTHING_RUNS),
    Mutant("hf trusts no remote code", "evaluation/hf_model.py", "trust_remote_code=False", "trust_remote_code=True", HELD),
    Mutant("vllm trusts no remote code", "evaluation/vllm_model.py", "            trust_remote_code=False,", "            trust_remote_code=True,", HELD),
    Mutant("the gate trusts no remote code", "export/gate.py", "AutoTokenizer.from_pretrained(folder, trust_remote_code=False)", "AutoTokenizer.from_pretrained(folder)", NOTHING_RUNS),
    Mutant("templates run in the sandbox", "chat/probe.py", "jinja2.sandbox.ImmutableSandboxedEnvironment(", "jinja2.Environment(", HELD),
    Mutant("a template's time is bounded", "chat/bounds.py", "        signal.setitimer(signal.ITIMER_PROF, SECONDS)\n", "", f"{HELD}::test_bounds_of_a_template_end_with_it"),
    Mutant("a template's memory is bounded", "chat/bounds.py", "room = _size() + ROOM", "room = resource.RLIM_INFINITY", f"{HELD}::test_bounds_of_a_template_end_with_it"),
    Mutant("a lost launch of SkyPilot is found by its name", "launch/sky/scheduler.py", "        if known := self._active(name):\n            return known\n        made", "        made", "test_sky.py::test_detach_follow_cancel_and_a_lost_answer"),
    Mutant("a secret that is not set is refused", "launch/sky/scheduler.py", "if missing := missing_secrets(self.cluster):\n            raise", "if missing := []:\n            raise", "test_sky.py::test_what_cannot_work_is_refused_before_anything_is_launched"),
    # --- paths, links, quoting
    Mutant("no path has '..'", "common/paths.py", 'p in ("", ".", "..")', 'p in ("", ".")', MANIFEST),
    Mutant("no path is in a home", "common/paths.py", 'path.startswith(("/", "~"))', 'path.startswith("/")', MANIFEST),
    Mutant("no path has a NUL", "common/paths.py", '        or "\\0" in path\n', "", MANIFEST),
    Mutant("a link does not leave DATA", "common/paths.py", "if not candidate.resolve().is_relative_to(root.resolve()):", "if False:", MANIFEST),
    Mutant("a link does not leave a stage", "common/paths.py", "if not joined.resolve().is_relative_to(root.resolve()):", "if False:", f"{HELD} {MANIFEST}"),
    Mutant("outputs are no links", "formats/manifest.py", "if links := [str(p) for p in found if p.is_symlink()]:", "if links := []:", MANIFEST),
    Mutant("a manifest reads nothing outside", "formats/manifest.py", '        file = inside(folder, entry.path, f"{folder / NAME}: outputs")', "        file = folder / entry.path", HELD),
    Mutant("a storage follows no link", "storage/local.py", "            if path.is_symlink():\n", "            if False:\n", "test_storage.py::test_links_are_reported_and_not_followed"),
    Mutant("a source that became a link is not read", "storage/local.py", "os.O_RDONLY | os.O_NOFOLLOW", "os.O_RDONLY", HELD),
    Mutant("a line of sbatch is one line", "launch/slurm/script.py", 'if re.search(r"[\\x00-\\x1f\\x7f\\\\]", value):', "if False:", HELD),
    Mutant("a number in the form of gres is refused", "launch/slurm/script.py", r'''if "," in form or re.search(r":\d{1,2}$", form):''', "if False:", "test_slurm_sites.py::test_what_no_script_could_hold_is_refused"),
    Mutant("an option of sbatch that the script sets itself is refused", "launch/slurm/script.py", "if name[2:] in OWN_OPTIONS:", "if False:", "test_slurm_sites.py::test_what_no_script_could_hold_is_refused"),
    Mutant("a misspelt address of a bucket makes no folder of that name", "recipe/clusters.py", "elif _SCHEME.match(place) and not _BUCKET.fullmatch(place):", "elif False:", "test_own_values.py::test_a_place_that_would_become_a_folder_of_that_name_is_refused"),
    Mutant("a value of sbatch is quoted", "launch/slurm/script.py", """        value = '"' + value""", """        value = "" + value""", HELD),
    Mutant("only what a stage names is published", "runner/publish.py", "            path.unlink()\n", "            pass\n", HELD),
    Mutant("unfinished files are swept", "common/files.py", "        file.unlink(missing_ok=True)\n", "        pass\n", HELD),
    # --- locks, errors, redaction, escaping, formats
    Mutant("a second writer is refused", "common/locks.py", "fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", HELD),
    Mutant("a file that is too large is an error of the disk", "common/process.py", ", errno.EFBIG)", ")", HELD),
    Mutant("signatures are redacted", "storage/retries.py", 'r"\\1…", text)', 'r"\\g<0>", text)', "test_gcs.py::test_sessions_and_signatures_are_in_no_message"),
    Mutant("pages escape text", "reporting/page.py", "autoescape=True", "autoescape=False", "test_report.py::test_data_cannot_write_markup"),
    Mutant("an unknown field is refused", "formats/record.py", 'if unknown and not getattr(cls, "SKIPS_UNKNOWN", False):', "if False:", "test_formats.py"),
    Mutant("a newer file is not taken for a damaged one", "formats/record.py", "self.newer = type(found) is int and found > reads", "self.newer = False", "test_formats.py"),
    Mutant("training survives the reader of its output", "training/logs.py", "QUIT USR1 PIPE;", "QUIT USR1;", "test_logs.py"),
    Mutant("LATEST and BEST are never removed", "checkpoint/step_folder.py", "{latest_step, named_step(out, BEST), *protected,", "{*protected,", "test_saving.py::test_retention_keeps_the_newest_and_whatever_latest_or_best_names"),
    Mutant("a copy leaves the checkout's environment alone", "../../env/setup.sh", "refuse_anothers\ncase", "case", "test_environment.py::test_a_checkout_installs_nothing_into_the_environment_of_another"),
    # --- damaged inputs (tests/fuzz.py)
    Mutant("a damaged list of numbers is an error", "data/dataset.py", '        raise ValueError(f"{type(error).__name__}: {error}") from None\n', "        raise\n", "test_fuzz.py::test_a_list_of_numbers_that_numpy_cannot_parse_is_refused"),
    Mutant("documents tile their parts", "data/dataset.py", "if not length.all() or too_far or not _same_numbers(starts, ends):", "if False:", "test_fuzz.py test_dataset.py"),
    Mutant("offsets of an Arrow file stay inside", "sources/blocks.py", "        column.view(_without_texts(column.type)).validate(full=True)\n", "        pass\n", "test_sources.py::test_an_arrow_file_whose_offsets_leave_its_text_is_refused_and_not_read"),
    Mutant("an empty compressed file is broken", "sources/unpack.py", "        if not file.stat().st_size:", "        if False:", "test_sources.py"),
    Mutant("metadata of a checkpoint has its fields", "checkpoint/dcp_reader.py", "            _check_fields(found)\n", "            pass\n", "test_checkpoint.py::test_metadata_without_its_fields_is_refused"),
    Mutant("a document's part is there", "data/dataset.py", ' or (documents["part"] >= len(sizes)).any()', "", "test_fuzz.py::test_a_part_whose_position_does_not_fit_is_refused"),
    # --- data that says less than it seems to
    Mutant("text that is a list of messages is refused", "chat/messages.py", "        if text[:1] in (", "        if text[:1] not in (", "test_bad_rows.py"),
    Mutant("an answer may be a list of messages", "chat/messages.py", 'return roles == {"assistant"} if', "return True if", "test_rows.py::test_an_answer_may_be_json"),
    Mutant("thoughts are in one place", "chat/messages.py", '    if name and "think>" in content:\n', "    if False:\n", "test_bad_rows.py"),
    Mutant("a column in quotes is refused", "data/accounting.py", 'if source.quoted_texts == "keep" or', "if True or", "test_quoted_texts.py"),
    Mutant("groups ignore the spelling of a text", "data/batch.py", "    if not text.isascii():\n", "    if False:\n", "test_groups.py"),
    Mutant("a file of text is text", "sources/input_files.py", "        check_text(name, file)\n", "        pass\n", "test_sources.py::test_a_text_file_that_is_no_text_is_refused"),
    Mutant("a README's options are followed or refused", "recipe/dataset_files.py", "        if config.get(option) is not None and", "        if False and", "test_dataset_files.py::test_a_readme_that_is_not_followed_completely_is_refused"),
    Mutant("tool results follow the order of their calls", "chat/rows.py", "        if not self.writes_ids:\n", "        if False:\n", "test_results_of_calls.py::test_results_out_of_order_reject_the_row"),
    Mutant("compiled code compares ids of results with those of calls", "data/fast/json_values.py", "not fits_result(data, messages, result, last, values)", "False", "test_results_of_calls.py::test_results_out_of_order_reject_the_row"),
    Mutant("compiled code looks at results after those of the calls", "data/fast/json_values.py", "(more_calls or has_more_results(messages, result, last))", "False", "test_results_of_calls.py::test_results_out_of_order_reject_the_row"),
    Mutant("results in columns are compared in Python", "data/fast/values.py", "return bool(more or (calls", "return bool(False and (calls", "test_results_of_calls.py::test_results_out_of_order_reject_the_row"),
    Mutant("a call is no empty answer", "data/fast/turns.py", " or calls[END] > calls[START]", "", "test_forms.py::test_these_rows_need_no_jinja"),
    # --- tokenizers and tasks that say less, or other things, than they seem to
    Mutant("a tokenizer gives the same ids each time", "data/vocabulary_checks.py", 'if dropout := content["model"].get("dropout"):', "if dropout := None:", "test_tokenizer_files.py"),
    Mutant("an added token has the id that it says", "data/vocabulary_checks.py", "!= id or tokenizer.id_to_token(id) != text:", "!= id and False:", "test_tokenizer_files.py"),
    Mutant("a configuration names tokens of the vocabulary", "data/vocabulary_checks.py", "if id is None or wanted not in (None, str(id)):", "if False:", "test_tokenizer_files.py"),
    Mutant("a tokenizer cuts no text", "data/vocabulary.py", "    made.no_truncation()\n", "", "test_tokenizer_files.py"),
    Mutant("a tokenizer pads no text", "data/vocabulary.py", "    made.no_padding()\n", "", "test_tokenizer_files.py"),
    Mutant("a template has no byte order mark", "recipe/inputs.py", '    if text.startswith("\\ufeff"):\n', "    if False:\n", "test_tokenizer_files.py"),
    Mutant("a pointer of git-lfs is not the file", "common/files.py", '                raise SftError(f"{what}: a git-lfs pointer', '                SftError(f"{what}: a git-lfs pointer', "test_base_weights.py"),
    Mutant("a task's key is written once", "evaluation/task_config.py", 'if twice := [name for name in names if names.count(name) > 1]:\n            raise SftError(f"{file}: {twice[0]} is', 'if twice := []:\n            raise SftError(f"{file}: {twice[0]} is', "test_task_files.py"),
    Mutant("a task's fields are those of lm-eval", "evaluation/task_config.py", "    _check_names(config, known, str(file))\n", "    pass\n", "test_task_files.py"),
    Mutant("a task's stop string is a text", "evaluation/task_config.py", "        if not isinstance(text, str) or not text:\n", "        if False:\n", "test_task_files.py"),
    Mutant("a metric is there once", "evaluation/task_config.py", '    if twice := [name for name in names if names.count(name) > 1]:\n        raise SftError(f"{where}:', '    if twice := []:\n        raise SftError(f"{where}:', "test_task_files.py"),
    Mutant("a task's split is one of its files", "evaluation/task_config.py", "is not None and split not in splits:", "is not None and False:", "test_task_files.py"),
    Mutant("the right answers are not one text", "evaluation/rehearsal.py", "    if is_constant and not", "    if False and not", "test_task_files.py"),
    Mutant("the right answer is one of the choices", "evaluation/rehearsal.py", "            if not (one in choices if", "            if False and not (one in choices if", "test_task_files.py"),
    Mutant("a task has two choices", "evaluation/rehearsal.py", "    if most < 2:\n", "    if False:\n", "test_task_files.py"),
    Mutant("a task's prompts differ", "evaluation/rehearsal.py", "and len(asked) == 1 and", "and len(asked) == 0 and", "test_task_files.py"),
    Mutant("a task's metrics are scored", "evaluation/rehearsal.py", "        if lacks := [name for", "        if False and [name for", "test_task_files.py"),
    Mutant("a task's scores can be aggregated", "evaluation/rehearsal.py", "                function(values)\n", "                pass\n", "test_task_files.py"),
    # --- faulty hardware
    Mutant("a replay that differs stops training", "training/loop.py", "        run.replay.check(run.stage.out, run.stage.log)\n", "        pass\n", "test_replay.py::test_a_wrong_bit_without_a_third_rank"),
    Mutant("a replay leaves no gradient", "training/replay.py", "            drop()\n", "", "test_replay.py::test_replays_change_no_byte_and_agree"),
    Mutant("a replay compares every bit", "training/replay.py", "found[number] = bits(gradient).sum(dtype=torch.int64).view(1)", "found[number] = gradient.sum().view(1).long()", "test_replay.py::test_bits_differ_by_any_bit_and_bounds_by_what_matters"),
    Mutant("a third rank decides", "training/replay.py", "    if owner == other or vote.same(theirs):\n", "    if owner == other:\n", "test_replay.py::test_the_vote_names_the_rank_that_is_alone"),
    Mutant("a preflight refuses wrong values", "training/preflight.py", "    if problems := wrong(found):\n", "    if problems := []:\n", "test_preflight.py::test_a_rank_with_a_wrong_value_stops_the_job_before_it_trains"),
    Mutant("a preflight compares products of ranks", "training/preflight.py", "                if f.product != usual\n", "                if False\n", "test_preflight.py::test_a_wrong_product_is_named_by_the_majority_of_the_same_device"),
    Mutant("a preflight compares the products of a rank", "training/preflight.py", "            differ |= bits(result) != first\n", "            pass\n", "test_preflight.py::test_a_product_that_changes_and_a_memory_that_forgets_are_seen"),
    Mutant("a preflight reads memory back", "training/preflight.py", "            same &= (block == value).all()\n", "            pass\n", "test_preflight.py::test_a_product_that_changes_and_a_memory_that_forgets_are_seen"),
    Mutant("a preflight compares messages", "training/preflight.py", "whole = bool((theirs == numbers ^ (other * 0x10001)).all())", "whole = True", "test_preflight.py::test_a_rank_with_a_wrong_value_stops_the_job_before_it_trains"),
    Mutant("a preflight compares the sum of the ranks", "training/preflight.py", "return bool((value == expected).all())", "return True", "test_preflight.py::test_a_rank_with_a_wrong_value_stops_the_job_before_it_trains"),
    # --- configurations of other trainers
    Mutant("import-config replaces no recipe", "importing/importer.py", "    if target.exists():\n", "    if False:\n", "test_import_config.py::test_the_program_writes_the_recipe_once_and_lists_every_key"),
    Mutant("import-config takes a field from one key", "importing/options.py", "draft.tables[table][field] != before", "False", "test_import_config.py::test_the_page_of_commands_is_one_recipe"),
    Mutant("import-config takes no text for another's text", "importing/options.py", "hint_of(cls, field) in (int, float, bool)", "True", "test_import_config.py::test_what_has_no_counterpart_is_listed_with_its_reason"),
    Mutant("no answer trains another message's text", "chat/learn.py", "if foreign := probe.foreign_text(turns):", "if foreign := None:", "test_jinja.py::test_template_whose_masks_would_be_wrong_is_refused"),
    Mutant("import-config refuses other methods", "importing/importer.py", "    _refuse_other_methods(file, config)\n", "", "test_import_config.py::test_what_gives_no_recipe_is_an_error"),
    Mutant("import-config lists keys that it does not know", "importing/options.py", "            _explain(rest, key, name, cluster)", "            pass", "test_import_config.py::test_what_has_no_counterpart_is_listed_with_its_reason"),
)  # fmt: skip


PRELOADED = ("numba", "pyarrow", "pytest", "hypothesis", "requests", "torch", "torch.distributed.fsdp", "transformers")
"""Packages that take seconds to import. Nothing of ours: each mutant must be imported again."""


def serve() -> None:
    """Runs the tests that it is asked for, each time in a process of its own."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert "sft" not in sys.modules  # a mutant would be the code without its change
    forks.serve(lambda asked: int(sys.modules["pytest"].main(asked["words"])), PATIENCE)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy of the checkout to change, and the server that runs tests in it."""

    place: Path
    server: forks.Server
    times: Iterator[int]
    """A file gets another time with each change, or Python could take the bytecode of the one before."""

    def passes(self, tests: str) -> tuple[bool, str]:
        """Whether tests pass, and their last lines."""
        paths = [f"tests/{n}" for n in tests.split() if (self.place / "tests" / n.partition("::")[0]).is_file()]
        log = self.place / "mutants.log"
        log.unlink(missing_ok=True)
        status = self.server.ask({"words": ["-q", "-x", "-n0", "-p", "no:cacheprovider", *paths], "log": str(log)})
        shown = log.read_text(encoding="utf-8", errors="replace")
        if status is None or status > 1:  # below 0: a signal ended it, as a mutant may
            raise SystemExit(f"pytest ended with {status}: {shown}")
        return status == 0, shown[-3000:]

    def caught(self, mutant: Mutant) -> str:
        """ "caught", or what is wrong."""
        file = self.place / "lib/sft" / mutant.file
        text = file.read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            return f"its text is in {mutant.file} {count} times"
        self._write(file, text.replace(mutant.old, mutant.new))
        try:
            return "NOT CAUGHT" if self.passes(mutant.tests)[0] else "caught"
        finally:
            self._write(file, text)

    def _write(self, file: Path, text: str) -> None:
        file.write_text(text, encoding="utf-8")
        now = next(self.times)
        os.utime(file, (now, now))


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Copy]:
    """A new copy of this checkout."""
    place = copied(folder)
    if PEERS.is_dir():  # what other projects' packages have brought
        (place / PEERS.name).symlink_to(PEERS)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{place / 'lib'}:{place / 'benchmarks'}:{place / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with forks.started("import mutants; mutants.serve()", place, environment) as server:
        yield Copy(place, server, itertools.count(int(time.time())))


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if " ".join(words) in m.name]
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, opened(Path(folder)) as copy:
        ok, shown = copy.passes(" ".join(sorted({test for m in chosen for test in m.tests.split()})))
        if not ok:
            print(f"the tests fail without any change:\n{shown}")
            return 1
        print(f"{'protection':62}{'result':12}seconds", flush=True)
        for mutant in chosen:
            began = time.monotonic()
            result = copy.caught(mutant)
            wrong += result != "caught"
            print(f"{mutant.name:62}{result:12}{time.monotonic() - began:6.1f}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} protections are held by a test")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
