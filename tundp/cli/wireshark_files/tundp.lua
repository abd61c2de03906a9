-- What tundp decided of a packet, as fields of its own in captures of `tundp capture`.
--
-- A post-dissector: tundp.stage (read, send, receive, write, drop), tundp.label (e0.77),
-- tundp.reason of a drop, tundp.decision (the comment). Datagrams of flannel's UDP port are
-- shown as the IPv4 packets they carry; another port than 8285 is a preference.

local tundp = Proto("tundp", "tundp overlay")
local stage = ProtoField.string("tundp.stage", "Stage")
local label = ProtoField.string("tundp.label", "Packet")
local reason = ProtoField.string("tundp.reason", "Drop reason")
local decision = ProtoField.string("tundp.decision", "Decision")
local dropped = ProtoExpert.new("tundp.dropped", "Dropped by tundp", expert.group.SEQUENCE,
	expert.severity.ERROR)
tundp.fields = { stage, label, reason, decision }
tundp.experts = { dropped }
tundp.prefs.port = Pref.uint("UDP port", 8285, "The port of the overlay")

local interface_name = Field.new("frame.interface_name")
local comments = Field.new("frame.comment")

local function stage_of(name)
	local why = name:match("^drop/(.+)$")
	if why then
		return "drop", why
	end
	local is_udp = name:match("^udp:%d+/")
	if name:match("/in$") then
		return is_udp and "receive" or "read"
	elseif name:match("/out$") then
		return is_udp and "send" or "write"
	end
end

function tundp.dissector(_, pinfo, tree)
	local comment = comments()
	local name = interface_name()
	if not comment or not name then
		return
	end
	local text = tostring(comment.value)
	local id = text:match("^#([ed]%d+%.[%d.]+)")
	local kind, why = stage_of(tostring(name.value))
	if not id or not kind then
		return
	end
	local branch = tree:add(tundp)
	branch:append_text(": " .. text)
	branch:add(stage, kind):set_generated()
	branch:add(label, id):set_generated()
	branch:add(decision, text):set_generated()
	if why then
		local item = branch:add(reason, why)
		item:set_generated()
		item:add_proto_expert_info(dropped, text)
		pinfo.cols.info:prepend("[dropped: " .. why .. "] ")
	end
end

local carried
local function follow_port()
	if carried then
		DissectorTable.get("udp.port"):remove(carried, Dissector.get("ip"))
	end
	carried = tundp.prefs.port
	DissectorTable.get("udp.port"):add(carried, Dissector.get("ip"))
end
tundp.prefs_changed = follow_port
follow_port()

register_postdissector(tundp)
