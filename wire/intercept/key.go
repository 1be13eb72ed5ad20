package intercept

import "strings"

// Key is the key of an Entry in State.Entries, and that of its file without
// ".json": the Service's name, or scale.KIND.NAME of a workload KIND/NAME.
func Key(kind, target string) string {
	if kind == Scale {
		return "scale." + strings.ReplaceAll(target, "/", ".")
	}
	return target
}
