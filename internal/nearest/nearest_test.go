package nearest

import "testing"

func TestOf(t *testing.T) {
	known := []string{"exclude-ips", "include-ips", "image", "context", "at-boot"}
	for in, want := range map[string]string{
		"exclude-ip": "exclude-ips", "contxt": "context", "img": "image", "boot": "", "zzzzzz": "", "exclude": "exclude-ips",
	} {
		if got := Of(in, known); got != want {
			t.Errorf("Of(%q) = %q, want %q", in, got, want)
		}
	}
	if d := distance("kitten", "sitting"); d != 3 {
		t.Errorf("distance %d, want 3", d)
	}
}
