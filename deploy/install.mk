# install and uninstall: programs, kubectl plugin, unit, group and completions.
# Included by the top Makefile; wants bin/culvert and bin/culvertd to be built.
#
#   make install DESTDIR=/tmp/root PREFIX=/usr
#
# With DESTDIR nothing outside of it is touched: no group is made and systemd is
# not told.

DESTDIR       ?=
PREFIX        ?= /usr/local
BINDIR        ?= $(PREFIX)/bin
# culvertd looks for the culvert program beside itself, so that an upgrade never
# mixes two versions.
UNITDIR       ?= $(if $(filter /usr,$(PREFIX)),/usr/lib/systemd/system,/etc/systemd/system)
SYSUSERSDIR   ?= $(if $(filter /usr,$(PREFIX)),/usr/lib/sysusers.d,/etc/sysusers.d)
BASHCOMPDIR   ?= $(PREFIX)/share/bash-completion/completions
ZSHCOMPDIR    ?= $(PREFIX)/share/zsh/site-functions
FISHCOMPDIR   ?= $(PREFIX)/share/fish/vendor_completions.d

.PHONY: install uninstall

install:
	@test -x bin/culvert -a -x bin/culvertd || { echo "bin/culvert and bin/culvertd are not built: make binaries first" >&2; exit 1; }
	install -d -m 0755 $(DESTDIR)$(BINDIR) $(DESTDIR)$(UNITDIR) $(DESTDIR)$(SYSUSERSDIR) \
		$(DESTDIR)$(BASHCOMPDIR) $(DESTDIR)$(ZSHCOMPDIR) $(DESTDIR)$(FISHCOMPDIR)
	install -m 0755 bin/culvert bin/culvertd $(DESTDIR)$(BINDIR)/
	ln -sf culvert $(DESTDIR)$(BINDIR)/kubectl-culvert
	sed 's|/usr/local/bin/|$(BINDIR)/|' deploy/systemd/culvertd.service > $(DESTDIR)$(UNITDIR)/culvertd.service
	chmod 0644 $(DESTDIR)$(UNITDIR)/culvertd.service
	install -m 0644 deploy/systemd/culvert.sysusers $(DESTDIR)$(SYSUSERSDIR)/culvert.conf
	bin/culvert completion bash > $(DESTDIR)$(BASHCOMPDIR)/culvert
	bin/culvert completion zsh > $(DESTDIR)$(ZSHCOMPDIR)/_culvert
	bin/culvert completion fish > $(DESTDIR)$(FISHCOMPDIR)/culvert.fish
ifeq ($(DESTDIR),)
	getent group culvert >/dev/null || groupadd --system culvert
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload && systemctl enable culvertd && systemctl restart culvertd; \
	else echo "no systemd is running here: start the daemon with: sudo $(BINDIR)/culvertd"; fi
	@echo "who shall connect must be in the group: sudo usermod -aG culvert USER, and then log in again"
endif

uninstall:
ifeq ($(DESTDIR),)
	@if [ -d /run/systemd/system ]; then systemctl disable --now culvertd || true; fi
	@if [ -x $(BINDIR)/culvertd ]; then $(BINDIR)/culvertd cleanup; fi
endif
	rm -f $(DESTDIR)$(BINDIR)/culvert $(DESTDIR)$(BINDIR)/culvertd $(DESTDIR)$(BINDIR)/kubectl-culvert \
		$(DESTDIR)$(UNITDIR)/culvertd.service $(DESTDIR)$(SYSUSERSDIR)/culvert.conf \
		$(DESTDIR)$(BASHCOMPDIR)/culvert $(DESTDIR)$(ZSHCOMPDIR)/_culvert $(DESTDIR)$(FISHCOMPDIR)/culvert.fish
ifeq ($(DESTDIR),)
	rm -rf /var/lib/culvert /run/culvert
	@if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo "the group culvert and /etc/culvert stay; sudo groupdel culvert removes the group"
endif
